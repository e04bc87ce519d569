"""Processes below this one, from /proc: what their names are, the memory they hold, and how it went over a run.

Ray's actors are named `ray::PartWriter` while they wait and `ray::PartWriter.run` while they work.
"""

from __future__ import annotations

import os
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

ACTOR, AT_WORK = "ray::PartWriter", "ray::PartWriter.run"


def parents() -> dict[int, int]:
    """Parent of every process by its number."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            found[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended
    return found


def below(pid: int) -> set[int]:
    """Processes that this one started, and those that they started."""
    found, known = {pid}, parents()
    while more := {child for child, parent in known.items() if parent in found} - found:
        found |= more
    return found - {pid}


def title(pid: int) -> str:
    """Command line of a process, as it was given, or as it has set it; empty when it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def resident_bytes(pid: int) -> int:
    """Resident memory of a process; 0 when it has ended."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (FileNotFoundError, ProcessLookupError):
        return 0


@dataclass(frozen=True)
class Sample:
    """Memory at one moment, bytes: of the driver, of the most loaded actor, of all processes together (shared pages often)."""

    seconds: float
    driver: int
    actor: int
    total: int


class MemoryWatch:
    """Samples of the memory of a process and all below it, taken by a thread while `watching` runs."""

    def __init__(self, pid: int, every_seconds: float = 2.0) -> None:
        self.pid, self.every_seconds = pid, every_seconds
        self.samples: list[Sample] = []

    def sample(self, seconds: float) -> None:
        """Take a sample."""
        found = below(self.pid)
        actors = [resident_bytes(pid) for pid in found if title(pid).startswith(ACTOR)]
        driver = resident_bytes(self.pid)
        total = driver + sum(map(resident_bytes, found))
        self.samples.append(Sample(seconds, driver, max(actors, default=0), total))

    @contextmanager
    def watching(self) -> Iterator[MemoryWatch]:
        """Sample until the block ends."""
        began, stop = time.monotonic(), threading.Event()

        def watch() -> None:
            while not stop.wait(self.every_seconds):
                self.sample(time.monotonic() - began)

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            stop.set()
            thread.join()


def memory_by_tenth(samples: Sequence[Sample]) -> list[dict[str, float]]:
    """Medians over tenths of the samples in which actors were there; fewer rows for less than ten of them."""
    chosen = [sample for sample in samples if sample.actor]
    bounds = [round(number * len(chosen) / 10) for number in range(11)]
    return [
        {
            "seconds": chosen[first].seconds,
            "driver_bytes": statistics.median(sample.driver for sample in chosen[first:stop]),
            "actor_bytes": statistics.median(sample.actor for sample in chosen[first:stop]),
            "total_bytes": statistics.median(sample.total for sample in chosen[first:stop]),
        }
        for first, stop in pairwise(bounds)
        if stop > first
    ]
