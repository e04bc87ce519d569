"""Tasks of lm-eval: the verb that makes small ones, and measuring a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from amfm.data_pipeline.terminal import Waiting
from amfm.launch.arguments import JsonOption, Place
from amfm.launch.console import print_json, print_pairs
from amfm.launch.existing import require_exists

if TYPE_CHECKING:
    from amfm.pretrain.tasks.suite import TaskChoice

TasksOption = Annotated[
    str | None, typer.Option(metavar="NAME,...", help="Evaluate these lm-eval tasks instead (docs/evaluation.md).")
]
IncludePathOption = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Folder with YAML files of more tasks; default: evaluate.include_path."),
]
LimitOption = Annotated[int | None, typer.Option(min=1, help="Documents of each task; default: all.")]
NumFewshotOption = Annotated[int | None, typer.Option(min=0, help="Few-shot examples; default: as the task defines.")]


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
    from amfm.pretrain.tasks.make_tasks import make_tasks

    names, longest_answer = make_tasks(store, out, name=name, num_documents=documents)
    if as_json:
        print_json({"folder": str(out), "tasks": names, "longest_answer_tokens": longest_answer})
        return
    settings = f"evaluate.include_path={out} evaluate.tasks=[{','.join(names)}] evaluate.every_steps=40"
    rows = f"at least {longest_answer} tokens, for the longest answer"
    print_pairs("Tasks", [("folder", out), ("tasks", ", ".join(names)), ("rows", rows), ("in a run", settings)])


def read_choice(names: str, include_path: Path | None, limit: int | None, num_fewshot: int | None) -> TaskChoice:
    """Turn the options of a command line into a choice of tasks; `names` are separated by commas."""
    from amfm.pretrain.tasks.suite import TaskChoice

    listed = tuple(name.strip() for name in names.split(",") if name.strip())
    if not listed:
        raise ValueError(f"--tasks {names!r} names no task; give names separated by commas, such as arc_easy,hellaswag")
    return TaskChoice(listed, None if include_path is None else str(include_path), limit, num_fewshot)


def evaluate_on_tasks(checkpoint: Path, choice: TaskChoice, place: Place, *, as_json: bool) -> None:
    """Measure a checkpoint on tasks, and print the values on the first rank."""
    from amfm.pretrain.tasks.suite import evaluate_tasks

    with Waiting("amfm evaluate", speaks=place.is_first) as waiting:
        waiting("measuring tasks")
        values = evaluate_tasks(
            checkpoint,
            choice,
            device=place.device,
            backend=place.backend,
            precision=place.precision,
            num_ranks=place.num_ranks,
            announce=place.announce,
        )
    if not place.is_first:
        return
    if as_json:
        print_json({"tasks": values})
        return
    print_pairs(f"Tasks on {checkpoint}", [(name, f"{value:.4f}") for name, value in values.items()])


def add_verbs(app: typer.Typer) -> None:
    """Register the verb of this file."""
    app.command(epilog="Example: amfm tasks data/shakespeare data/tasks")(tasks)
