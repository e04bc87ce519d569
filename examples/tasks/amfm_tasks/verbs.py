"""The verb tasks: small tasks of lm-eval from the held-out text of a store."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from amfm.launch.arguments import JsonOption
from amfm.launch.console import print_json, print_pairs
from amfm.launch.existing import require_exists


def tasks(
    store: Annotated[
        Path, typer.Argument(metavar="STORE", help="Token store with a validation split.", callback=require_exists)
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Output folder, relative to where the tasks are run.")],
    *,
    name: Annotated[
        str | None, typer.Option(help="Prefix of the task names; default: the name of the store or project.")
    ] = None,
    documents: Annotated[int, typer.Option(min=1, help="Maximum number of documents per task.")] = 200,
    as_json: JsonOption = False,
) -> None:
    """The verb `tasks`."""
    from amfm_tasks.make_tasks import make_tasks

    names, longest_answer = make_tasks(store, out, name=name, num_documents=documents)
    if as_json:
        print_json({"folder": str(out), "tasks": names, "longest_answer_tokens": longest_answer})
        return
    settings = f"evaluate.include_path={out} evaluate.tasks=[{','.join(names)}] evaluate.every_steps=40"
    rows = f"at least {longest_answer} tokens, for the longest answer"
    print_pairs("Tasks", [("folder", out), ("tasks", ", ".join(names)), ("rows", rows), ("in a run", settings)])
