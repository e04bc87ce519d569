"""Progress of a study on standard error: a live table on a terminal, a line an event anywhere else.

How it works: the display reads the newest line of each running cell's metrics.jsonl, as a run writes it anyway; cells
need no channel to the study. On a terminal the table redraws itself; in a log lines come at events and once a minute.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from amfm.pretrain.monitor.live import LivePanel
from amfm.pretrain.monitor.panel import format_duration
from amfm.pretrain.stages import total_steps
from amfm_study.grid import Cell
from amfm_study.run import CellEnd
from amfm_study.table import CellResult, measure_of

State = Literal["running", "failed", "waiting", "stopped", "done"]
ORDER: tuple[State, ...] = ("running", "failed", "waiting", "stopped", "done")
STYLES = {"running": "cyan", "failed": "bold red", "waiting": "dim", "stopped": "yellow", "done": "green"}
TAIL_BYTES = 8192
REMINDER_SECONDS = 60.0


@dataclass
class Line:
    """State of one cell as it is shown."""

    cell: Cell
    state: State = "waiting"
    step: int = 0
    note: str = ""
    began: float = 0.0
    seconds: float = 0.0


class StudyDisplay:
    """Shows all cells of a study; call `close` to leave the last table standing."""

    def __init__(
        self, cells: Sequence[Cell], finished: Sequence[CellResult], *, console: Console | None = None
    ) -> None:
        self.lines = {cell.name: Line(cell) for cell in cells}
        self.console = console or Console(stderr=True, highlight=False, soft_wrap=True)
        self.reminded = time.monotonic()
        for result in finished:
            line = self.lines[result.name]
            line.state, line.note = "done", describe_result(line.cell, result)
        self.live: LivePanel | None = None
        if self.console.is_terminal:
            self.live = LivePanel(self.console, self.draw)
            self.live.start()
        elif finished:
            self.say(f"{len(finished)} of {len(cells)} runs are done")

    def begin(self, cell: Cell) -> None:
        """Note that a cell started."""
        line = self.lines[cell.name]
        line.state, line.began = "running", time.monotonic()
        self.print_event(f"{cell.name}: started ({self.count('done')} of {len(self.lines)} done)")

    def end(self, cell: Cell, end: CellEnd, result: CellResult | None) -> None:
        """Note that a cell ended: with its result, with a cause of failure, or stopped on request."""
        line = self.lines[cell.name]
        line.seconds = time.monotonic() - line.began
        if end.cause:
            line.state, line.note = "failed", end.cause
        elif result is None:
            line.state, line.note = "stopped", "saved"
        else:
            line.state, line.note = "done", describe_result(cell, result)
        self.print_event(f"{cell.name}: {line.state} after {format_duration(line.seconds)}, {line.note}")

    def poll(self) -> None:
        """Read how far the running cells are."""
        running = [line for line in self.lines.values() if line.state == "running"]
        for line in running:
            newest = last_metrics(Path(line.cell.config.run.dir) / "metrics.jsonl")
            if newest is not None:
                line.step, line.note = int(newest[0]), newest[1]
            line.seconds = time.monotonic() - line.began
        # A log gets a sign of life once a minute; a terminal shows it all the time.
        if self.live is None and running and time.monotonic() - self.reminded > REMINDER_SECONDS:
            self.reminded = time.monotonic()
            at = ", ".join(f"{line.cell.name} step {line.step}" for line in running)
            self.say(f"{self.count('done')} of {len(self.lines)} done, {self.remaining()}; {at}")

    def close(self) -> None:
        """Stop redrawing and leave the table standing."""
        if self.live is not None:
            self.live.close()

    def count(self, state: State) -> int:
        """Number of cells in a state."""
        return sum(line.state == state for line in self.lines.values())

    def remaining(self) -> str:
        """Time left in words, at this call's mean seconds per step, over the runs at once."""
        steps = sum(total_steps(line.cell.config) if line.state == "done" else line.step for line in self.timed())
        seconds = sum(line.seconds for line in self.timed())
        left = sum(
            total_steps(line.cell.config) - line.step
            for line in self.lines.values()
            if line.state in ("running", "waiting")
        )
        if not steps:
            return "time left unknown"
        return f"{format_duration(seconds / steps * left / max(1, self.count('running')))} left"

    def timed(self) -> list[Line]:
        """Cells that ran in this call; those finished earlier have no time here."""
        return [line for line in self.lines.values() if line.seconds > 0 and line.state in ("running", "done")]

    def print_event(self, text: str) -> None:
        """Print an event if there is no table to show it."""
        if self.live is None:
            self.say(text)

    def say(self, text: str) -> None:
        """Print one line."""
        self.console.print(escape(f"study: {text}"))

    def draw(self) -> Table:
        """Table of all cells; running and failed ones on top, because a terminal may be shorter than the table."""
        table = Table(
            title=f"{self.count('done')} of {len(self.lines)} runs done, {self.remaining()}",
            title_justify="left",
            box=None,
            padding=(0, 2, 0, 0),
        )
        for column in ("run", "", "steps", "time", "newest"):
            table.add_column(column, no_wrap=column != "newest", overflow="fold" if column == "newest" else "ellipsis")
        for line in sorted(self.lines.values(), key=lambda line: ORDER.index(line.state)):
            steps = total_steps(line.cell.config)
            done = steps if line.state == "done" else line.step
            table.add_row(
                line.cell.name,
                line.state,
                f"{done:,}/{steps:,}",
                format_duration(line.seconds) if line.seconds else "",
                escape(line.note),
                style=STYLES[line.state],
            )
        return table


def describe_result(cell: Cell, result: CellResult) -> str:
    """Measure and speed of a finished cell in a few words."""
    return f"{measure_of(cell.config).name} {result.value:.4f}, {result.tokens_per_second:,.0f} tokens/s"


def last_metrics(path: Path) -> tuple[int, str] | None:
    """(step, loss and speed in words) of the last whole line of metrics.jsonl; None before the first."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
            # What follows the last newline is a line that the run is still writing.
            whole = file.read().split(b"\n")[:-1]
        newest = json.loads(whole[-1])
    except (FileNotFoundError, IndexError, json.JSONDecodeError):
        return None
    loss = "-" if newest["loss"] is None else f"{newest['loss']:.3f}"
    return int(newest["step"]), f"loss {loss}, {newest['tokens_per_second']:,.0f} tokens/s"
