"""Console output of verbs: results on standard output, progress and warnings on standard error.

Kept apart so that results can be piped while a person still sees what happens; `--json` verbs print one object only.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Column, Table

from amfm.data_pipeline.memory import no_garbage_collection
from amfm.data_pipeline.terminal import Waiting, format_seconds, printable
from amfm.launch.rank_command import choose_wait_policy

# How a warning of megatron-core begins, at each import, about libraries that we do not use.
UNUSED_LIBRARIES = "Transformer Engine and Apex are not installed"
BAR_WIDTH = 16  # of a progress bar, also where the warning next to it is long


def print_json(value: object) -> None:
    """Print one JSON object on standard output."""
    json.dump(value, sys.stdout, indent=2, ensure_ascii=False)
    sys.stdout.write("\n")
    sys.stdout.flush()


def say(text: str) -> None:
    """Print a warning for a person on standard error; square brackets in it are text, control characters are written out."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(plain(text))


def plain(value: object) -> str:
    """A value as text for rich, which is neither markup nor an order to the terminal."""
    return escape(printable(str(value)))


def print_pairs(title: str, pairs: Iterable[tuple[str, object]]) -> None:
    """Print a small table of names and values on standard output."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in pairs:
        table.add_row(plain(name), plain(value))
    # Not as the table's title, which would be folded to its width.
    console = output()
    console.print(f"[bold]{plain(title)}[/bold]", soft_wrap=not console.is_terminal)  # a terminal cuts words
    console.print(table)


def print_rows(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table with a header on standard output; where a terminal is too narrow for its words, a paragraph per row."""
    table = Table(header_style="bold")
    for column in columns:
        table.add_column(plain(column), overflow="fold")
    cells = [[plain(cell) for cell in row] for row in rows]
    for row in cells:
        table.add_row(*row)
    console = output()
    console.print(f"[bold]{plain(title)}[/bold]", soft_wrap=not console.is_terminal)  # a terminal cuts words
    unlimited = console.options.update(width=10**6)
    if Measurement.get(console, unlimited, table).minimum <= console.width:
        console.print(table)
        return
    for first, *rest in cells:
        console.print(f"[cyan]{first}[/cyan]")
        words = "; ".join(f"{column} {cell}" for column, cell in zip(columns[1:], rest) if cell)
        console.print(Padding(words, (0, 0, 0, 2)))


def output() -> Console:
    """Console of standard output; 160 columns wide when it is piped, so that lines are not folded at 80."""
    return Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=160)


@contextmanager
def loading(verb: str, what: str = "PyTorch") -> Iterator[None]:
    """Heavy imports of a verb, which says so where they take longer than a second.

    The collector would look through a million objects that stay: 2.2 of a rank's 7.4 seconds before its first step.
    """
    with Waiting(f"amfm {verb}") as waiting, no_garbage_collection():
        waiting(f"loading {what}")
        choose_wait_policy(os.environ)
        yield


class ShowProgress(Protocol):
    """What work calls with units done and in all, a warning, and the seconds left where it knows better than the clock."""

    def __call__(self, done: int, total: int, remark: str, seconds_left: float | None = None) -> None:
        """Show the present state."""


@contextmanager
def show_progress(name: str, *, every_seconds: float = 1.0, console: Console | None = None) -> Iterator[ShowProgress]:
    """Yield a function of (done, total, warning) that shows progress and the time left on standard error.

    A bar on a terminal, where a warning that is too long for the line is cut and the bar is not; elsewhere at most a line
    every `every_seconds`, and one at the end.
    """
    console = console or Console(stderr=True, highlight=False, soft_wrap=True)
    began = time.monotonic()

    def describe_left(done: int, total: int, seconds_left: float | None) -> str:
        if seconds_left is None and 0 < done < total:
            seconds_left = (time.monotonic() - began) * (total - done) / done
        return f"{format_seconds(seconds_left)} to go" if seconds_left and done < total else ""

    if not console.is_terminal:
        last = time.monotonic() - every_seconds

        def show_line(done: int, total: int, remark: str, seconds_left: float | None = None) -> None:
            nonlocal last
            now = time.monotonic()
            if done >= total or now - last >= every_seconds:
                left = describe_left(done, total, seconds_left)
                console.print(plain(f"{name}: {done:,}/{total:,} {remark}{', ' if left else ''}{left}"))
                last = now

        yield show_line
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(BAR_WIDTH, table_column=Column(min_width=BAR_WIDTH)),
        MofNCompleteColumn(table_column=Column(no_wrap=True)),
        TimeElapsedColumn(table_column=Column(no_wrap=True)),  # of work that is not counted, the only sign of life
        TextColumn("{task.fields[left]}", table_column=Column(no_wrap=True)),
        TextColumn("{task.fields[remark]}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)),
    )
    with Progress(*columns, console=console, expand=True) as bar:
        task = bar.add_task(name, total=None, remark="", left="")

        def show_bar(done: int, total: int, remark: str, seconds_left: float | None = None) -> None:
            left = describe_left(done, total, seconds_left)
            bar.update(task, completed=done, total=total, remark=plain(remark), left=left)

        yield show_bar
