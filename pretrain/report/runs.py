"""Rows of `amfm runs`: what each run directory of a folder says about its run, with the verdict of the report."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from amfm.pretrain.monitor.follow import FollowedRun, to_seconds
from amfm.pretrain.report.data import read_run
from amfm.pretrain.report.goodput import measure_goodput
from amfm.pretrain.report.verdict import describe_state, judge_run, number

LOGS = {"events.jsonl", "metrics.jsonl"}


@dataclass(frozen=True)
class RunRow:
    """One run. step: the newest, 0 before the first. loss: of the newest step. best: lowest validation loss.

    seconds: for which it held its machines. last_event, last_time: the newest that was written, seconds since 1970.
    """

    run: str
    state: str
    step: int
    steps: int
    loss: float | None
    best: float | None
    best_step: int | None
    tokens: float | None
    tokens_per_second: float | None
    seconds: float | None
    last_event: str
    last_time: float | None
    health: str

    def to_json(self) -> dict[str, Any]:
        """The row as JSON values."""
        return asdict(self)


def find_runs(folder: Path) -> Iterator[Path]:
    """Run directories at or below a folder, in the order of their names; none inside of another, and no links are followed.

    Raises FileNotFoundError for a folder that is not there.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder; give one that holds run directories")
    for place, folders, files in os.walk(folder):
        folders.sort()
        if "config.yaml" in files and LOGS.intersection(files):
            folders.clear()
            yield Path(place)


def read_row(directory: Path, folder: Path) -> RunRow:
    """Read a run directory. Raises ValueError for files in it that cannot be read."""
    followed = FollowedRun(directory)
    seen = followed.poll()
    name = str(directory.relative_to(folder)) if directory != folder else directory.resolve().name
    if not followed.has_steps:
        steps = followed.panel.last_step
        last, moment = find_newest(seen.events, None)
        return RunRow(name, seen.state, 0, steps, None, None, None, None, None, None, last, moment, "-")
    record = read_run(directory)
    steps_of, losses = record.series("validation_loss")
    best, best_step = min(zip(losses, steps_of), default=(None, None))
    last, moment = find_newest(record.events, record.metrics[-1].get("time"))
    use = measure_goodput(record)
    return RunRow(
        name,
        describe_state(record, seen)[0].partition(":")[0],
        record.last_step(),
        record.num_steps,
        number(record.metrics[-1], "loss"),
        best,
        best_step,
        record.last("tokens"),
        record.typical("tokens_per_second"),
        record.seconds() if use is None else use.held(),
        last,
        moment,
        judge_run(followed, seen, record).words(),
    )


def find_newest(events: Sequence[dict[str, Any]], step_time: object) -> tuple[str, float | None]:
    """Name of the newest event, and when it or the newest step was written."""
    times = [moment for event in events[-1:] if (moment := to_seconds(event.get("time"))) is not None]
    times += [float(step_time)] if isinstance(step_time, int | float) else []
    return str(events[-1].get("event")) if events else "-", max(times, default=None)


def sort_rows(rows: Sequence[RunRow], column: str, *, reverse: bool) -> list[RunRow]:
    """Sort by a column, rows without a value in it last."""
    known = [row for row in rows if getattr(row, column) is not None]
    unknown = [row for row in rows if getattr(row, column) is None]
    return sorted(known, key=lambda row: getattr(row, column), reverse=reverse) + unknown
