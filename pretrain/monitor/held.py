"""For which time a launcher held the machines of a run: also before its ranks begin, between attempts and after the last one.

Steps, starts and ends of ranks are in the run's own logs; checks of nodes, loading, waits for storage or lost nodes, and what
a queue system takes to end a job are not. So the launcher appends when its process began, and sets the file's own time while
it lives: whatever ends it, the last sign of life stays.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from amfm.data_pipeline.durable.lines import LineFile, read_lines
from amfm.pretrain.event_log import log_time
from amfm.pretrain.monitor.starting import process_began

NAME = "launch/held.jsonl"
SIGN_SECONDS = 5.0
Interval = tuple[float, float]  # seconds since 1970


@contextmanager
def holding(run_dir: Path) -> Iterator[None]:
    """Record that the machines of a run are held, from the begin of this process to the end of the block. What the disk rejects is left out."""
    path, ended = run_dir / NAME, threading.Event()

    def give_signs() -> None:
        while not ended.wait(SIGN_SECONDS):
            extend_held(run_dir, log_time())

    with suppress(OSError):
        before = path.stat().st_mtime if path.is_file() else None
        lines = LineFile(path)
        lines.write({"began_at": process_began(), "before_until": before})
        lines.close()
    extend_held(run_dir, log_time())
    threading.Thread(target=give_signs, name="launcher-signs", daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        extend_held(run_dir, log_time())


def extend_held(run_dir: Path, until: float) -> None:
    """Note that the machines were still held at this time, by the newest launcher."""
    with suppress(OSError):
        os.utime(run_dir / NAME, (until, until))


def read_held(run_dir: Path) -> list[Interval]:
    """When launchers held the machines of a run, oldest first; nothing if none recorded it."""
    path = run_dir / NAME
    if not path.is_file():
        return []
    found = [line for _, line in read_lines(path) if line is not None and isinstance(line.get("began_at"), float)]
    ends = [line.get("before_until") for line in found[1:]] + [path.stat().st_mtime]
    intervals, last = [], 0.0
    for line, end in zip(found, ends):
        if isinstance(end, float):
            # One that waited for the end of the launcher before it held nothing of the run until then.
            intervals.append((max(line["began_at"], last), end))
            last = end
    return intervals


def overlap(held: Sequence[Interval], begin: float, end: float) -> float:
    """Seconds between two moments for which machines were held."""
    return sum(max(0.0, min(last, end) - max(first, begin)) for first, last in held)


def is_held(held: Sequence[Interval], moment: float) -> bool:
    """Whether a launcher held the machines at a moment, give or take its last sign."""
    return any(first <= moment <= last + 2 * SIGN_SECONDS for first, last in held)
