"""Straggler detection: each rank times its own work between collectives, and the times are compared."""

from __future__ import annotations

import socket
import statistics
from dataclasses import dataclass, field

from pretrain.parallel import Parallel

STRAGGLER_STEPS = 20


@dataclass(frozen=True)
class Straggler:
    """A rank that computes longer than the median of all ranks, by so many percent."""

    rank: int
    host: str
    percent: float

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host} by {self.percent:.0f}%"


@dataclass
class StepTimes:
    """This rank's busy seconds of the steps since the last comparison."""

    seconds: list[float] = field(default_factory=list)

    def add(self, seconds: float) -> None:
        """Add a step's busy seconds: reading and computing, without waiting for others."""
        self.seconds.append(seconds)

    def find(self, parallel: Parallel, percent: float | None) -> list[Straggler]:
        """Find the slow ranks, slowest first, and start over. A rank's median step counts, so one pause names nobody.

        Ranks that exchange activations (tensor, context, pipeline, expert) wait for each other and look alike: all of a
        group are named. Every rank must call this.
        """
        own = statistics.median(self.seconds)
        self.seconds.clear()
        if percent is None or parallel.world_size == 1:
            return []
        reports = parallel.gather_objects((socket.gethostname(), own))
        return compare_ranks(reports, percent)


def compare_ranks(reports: list[tuple[str, float]], percent: float) -> list[Straggler]:
    """Find the stragglers among (host, seconds) of all ranks, in rank order."""
    median = statistics.median(seconds for _, seconds in reports)
    excess = [(100 * (seconds / median - 1), rank, host) for rank, (host, seconds) in enumerate(reports)]
    return [Straggler(rank, host, slower) for slower, rank, host in sorted(excess, reverse=True) if slower > percent]
