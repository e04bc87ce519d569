"""When a start began, and what it was at before it had a log: starts that fail there cost time too.

The main rank appends what it is at to `run.dir/starting.jsonl`. The start that comes as far as its log records in its event
what it finds there of others, and removes the file.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

from amfm.data_pipeline.durable.lines import LineFile, read_lines
from amfm.data_pipeline.progress import Report
from amfm.pretrain.event_log import in_iso, log_time

NAME = "starting.jsonl"
NOTE_SECONDS = 1.0  # between two lines, also while a library loads or compiles
IMPORTED = log_time()


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
        self.path = run_dir / NAME
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
