"""The verb that lists runs: runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from amfm.launch.arguments import JsonOption
from amfm.launch.console import print_json, print_rows, say

if TYPE_CHECKING:
    from amfm.pretrain.report.runs import RunRow

HEALTH_WIDTH = 60  # of the table; --json and amfm watch have all of it
Column = Literal["run", "state", "step", "loss", "best", "tokens", "tokens_per_second", "seconds", "last_time"]


def runs(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="The folder that contains run directories, at any depth.")
    ],
    *,
    sort: Annotated[
        Column, typer.Option(help="Order of the rows; last_time: when the run last wrote an event or a step.")
    ] = "last_time",
    reverse: Annotated[bool, typer.Option("--reverse", help="The other way round: largest, or newest, first.")] = False,
    as_json: JsonOption = False,
) -> None:
    """The verb `runs`.

    A row per run: state, step, loss, lowest validation loss, tokens, speed, time on its machines, newest event and whether it is
    well. Runs without a step come last.
    """
    from amfm.pretrain.report.runs import find_runs, read_row, sort_rows

    found, damaged = [], []
    for directory in find_runs(folder):
        try:
            found.append(read_row(directory, folder))
        except ValueError as error:
            damaged.append({"run": str(directory.relative_to(folder)), "error": str(error)})
    if not found and not damaged:
        raise ValueError(f"{folder} holds no run directory; give the folder above run.dir of runs that were started")
    rows = sort_rows(found, sort, reverse=reverse)
    for each in damaged:
        say(f"amfm: {each['run']} cannot be read: {each['error']}")
    if as_json:
        print_json({"runs": [row.to_json() for row in rows], "damaged": damaged})
        return
    columns = ("run", "state", "step", "loss", "best validation", "tokens", "tokens/s", "time", "last event", "health")
    print_rows(f"{len(rows)} runs of {folder}", columns, [describe_row(row) for row in rows])


def describe_row(row: RunRow) -> tuple[str, ...]:
    """Cells of a row."""
    from amfm.pretrain.monitor.panel import format_duration, show_number, since
    from amfm.pretrain.report.numbers import count

    best = "-" if row.best is None else f"{row.best:.4f} at {row.best_step:,}"
    last = "-" if row.last_time is None else f"{row.last_event}, {since(row.last_time)} ago"
    return (
        row.run,
        row.state,
        f"{row.step:,} of {row.steps:,}",
        show_number(row.loss, ".4f"),
        best,
        "-" if row.tokens is None else count(row.tokens),
        "-" if row.tokens_per_second is None else count(row.tokens_per_second),
        "-" if row.seconds is None else format_duration(row.seconds),
        last,
        row.health if len(row.health) <= HEALTH_WIDTH else f"{row.health[: HEALTH_WIDTH - 3]}...",
    )


def add_verbs(app: typer.Typer) -> None:
    """Register the verbs of this file."""
    app.command(epilog="Example: amfm runs runs --sort best")(runs)
