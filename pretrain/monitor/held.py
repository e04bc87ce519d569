"""Time of a run that its own log does not have: machines that its launcher held, and starts that had no log yet.

Steps, starts and ends of ranks are in the run's own logs; checks of nodes, loading, waits for storage or lost nodes, and what
a queue system takes to end a job are not. So the launcher appends when its process began, and sets the file's own time while
it lives: whatever ends it, the last sign of life stays.

The main rank appends what it is at to `run.dir/starting.jsonl`, because starts that fail there cost time too. The start that
comes as far as its log records in its event what it finds there of others, and removes the file.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import Any

from amfm.data_pipeline.durable.json_files import LineFile, read_lines
from amfm.data_pipeline.terminal import Report
from amfm.pretrain.launcher_protocol import in_iso, log_time

HELD = "launch/held.jsonl"
SIGN_SECONDS = 5.0
Interval = tuple[float, float]  # seconds since 1970
STARTING = "starting.jsonl"
NOTE_SECONDS = 1.0  # between two lines, also while a library loads or compiles
IMPORTED = log_time()


@contextmanager
def holding(run_dir: Path) -> Iterator[None]:
    """Record that the machines of a run are held, from the begin of this process to the end of the block. What the disk rejects is left out."""
    path, ended = run_dir / HELD, threading.Event()

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
        os.utime(run_dir / HELD, (until, until))


def read_held(run_dir: Path) -> list[Interval]:
    """When launchers held the machines of a run, oldest first; nothing if none recorded it."""
    path = run_dir / HELD
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


def process_began() -> float:
    """When this process began, in seconds since 1970: by the kernel, or when this file was imported."""
    try:
        ticks = int(Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19])
        return log_time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))
    except (OSError, AttributeError, ValueError):  # not Linux
        return IMPORTED


# Of the starts in this process: the first began with it, later ones when they are made.
_beginnings: Iterator[float | None] = chain([process_began()], iter(lambda: None, 0))


class Starting:
    """A start that has the run's lock and no log yet; exists only on the main rank."""

    def __init__(self, run_dir: Path) -> None:
        self.began = next(_beginnings) or log_time()
        self.path = run_dir / STARTING
        self.at = "begin"
        self._lines = LineFile(self.path)
        self.note()
        self._ended = threading.Event()
        self._noting = threading.Thread(target=note_always, args=(weakref.ref(self), self._ended), daemon=True)
        self._noting.start()

    def note(self) -> None:
        """Append what the start is at; a full disk is for what follows to report."""
        with suppress(OSError):
            self._lines.write({"began_at": self.began, "time": log_time(), "at": self.at})

    def hearing(self, report: Report) -> Report:
        """Make a report that notes what it hears."""

        def both(what: str, done: int = 0, total: int = 0) -> None:
            self.at = what
            report(what, done, total)

        return both

    def facts(self) -> dict[str, Any]:
        """When this start began, and those before it that came to no log, with the seconds until their last sign of life."""
        failed = [
            {"began_at": in_iso(start["began_at"]), "seconds": start["time"] - start["began_at"], "at": start["at"]}
            for start in read_failed(self.path)
            if start["began_at"] != self.began
        ]
        return {"began_at": in_iso(self.began)} | ({"failed_starts": failed} if failed else {})

    def finish(self) -> None:
        """Remove the file, once the log has what it held."""
        self._ended.set()
        self._noting.join()
        self._lines.close()
        self.path.unlink(missing_ok=True)


def note_always(starting: weakref.ref[Starting], ended: threading.Event) -> None:
    """Note what a start is at, until it has a log or is given up."""
    while not ended.wait(NOTE_SECONDS):
        start = starting()
        if start is None:
            return
        start.note()
        del start


def read_failed(path: Path) -> list[dict[str, Any]]:
    """The last line of each start that a file has, oldest first; lines that are not as this file writes them are left out."""
    found: dict[float, dict[str, Any]] = {}
    for _, line in read_lines(path) if path.is_file() else ():
        if line is not None and all(isinstance(line.get(name), float) for name in ("began_at", "time")):
            found[line["began_at"]] = {"at": "", **line}
    return [found[began] for began in sorted(found)]
