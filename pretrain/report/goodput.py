"""Goodput of a run that was: seconds inside steps that count, of those for which it held its machines.

A failure that a launcher answered with another attempt costs all the time until that attempt's start. A run that was stopped,
or that no one restarted, held its machines until its last sign of life. A step that was done twice counts once.
"""

from __future__ import annotations

from datetime import datetime
from typing import NamedTuple

from amfm.pretrain.report.data import RunRecord

ENDS = ("end", "signal", "failed", "gave_up")


class Goodput(NamedTuple):
    """Seconds that trained, seconds that passed, and how often a launcher started the run again after a failure."""

    trained: float
    passed: float
    restarts: int

    def share(self) -> float:
        """Which part of the time trained."""
        return min(1.0, self.trained / self.passed)


def measure_goodput(record: RunRecord) -> Goodput | None:
    """Measure it from events and metrics; None where no start with its time was recorded."""
    times = [
        (str(event.get("event")), datetime.fromisoformat(event["time"]).timestamp())
        for event in record.events
        if isinstance(event.get("time"), str)
    ]
    starts = [index for index, (name, _) in enumerate(times) if name == "start"]
    if not starts:
        return None
    passed, restarts = 0.0, 0
    attempts = [times[begin:after] for begin, after in zip(starts, [*starts[1:], len(times)])]
    for attempt, following in zip(attempts, [*attempts[1:], []]):
        last, end = attempt[-1]
        if any(name == "restarted" for name, _ in following):
            end, restarts = following[0][1], restarts + 1
        elif not following and last not in ENDS:
            # It still runs, or was killed: steps write no events, and the newest line of metrics may be younger.
            end = max(end, (record.directory / "metrics.jsonl").stat().st_mtime)
        passed += end - attempt[0][1]
    return Goodput(record.seconds(), passed, restarts) if passed > 0 else None
