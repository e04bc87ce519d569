"""Straggler detection: each rank times its own work between collectives, and the times are compared.

A host that queues work for a GPU runs ahead of it, so its clock tells how fast it queues. On a GPU the passes are therefore
timed by two events in the stream that computes: a GPU that is slow, or that its host lets starve, is seen by them. They are
read after the step's report, for which the host has waited anyway. What a rank waits for others inside its passes
(model/parallel/waits.py: rows of experts, reductions and gathers, receives of a pipeline) is left out. Tensor and context
collectives and ZeRO 3's gathers are in: ranks that share them still look alike.

A `PhaseClock` tells the heartbeat where this rank is in a step, and times what keeps it busy: reading data and the passes are a
rank's own work, what it waits for in between, other ranks, is not.
"""

from __future__ import annotations

import socket
import statistics
import time
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch

from amfm.model.parallel.waits import DeviceWaits, HostWaits
from amfm.pretrain.monitor.heartbeat import Heartbeat
from amfm.pretrain.parallel import Parallel

STRAGGLER_STEPS = 20
UNTIL_UPDATE = (
    "data",
    "count",  # of valid tokens, over all ranks
    "forward",
    "reduce",
    "optimizer",
)  # phases of the step that is under way, not of the last one done


@dataclass(frozen=True)
class Straggler:
    """A rank that computes longer than the median of all ranks, by this many percent."""

    rank: int
    host: str
    percent: float

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host} by {self.percent:.0f}%"


class Stopwatch(ABC):
    """What times a block of code, as a context: `start`, `stop`, then `seconds`."""

    def __enter__(self) -> None:
        self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    @abstractmethod
    def start(self) -> None:
        """Note where the block begins."""

    @abstractmethod
    def stop(self) -> None:
        """Note where it ends."""

    @abstractmethod
    def seconds(self) -> float:
        """Seconds between the two."""


class HostClock(Stopwatch):
    """Times a step's passes by the host's clock, on which a CPU computes."""

    def __init__(self) -> None:
        self._waits = HostWaits()

    def start(self) -> None:
        """Note where the passes begin."""
        self._waits.listen()
        self._began = self._ended = time.perf_counter()

    def stop(self) -> None:
        """Note where they end."""
        self._ended = time.perf_counter()
        self._waits.stop()

    def seconds(self) -> float:
        """Seconds from `start` to `stop` without the waits for other ranks."""
        return self._ended - self._began - self._waits.seconds()


class DeviceClock(Stopwatch):
    """Times a step's passes on the stream of a GPU that computes them; what other streams exchange is not in it."""

    def __init__(self) -> None:
        self._began, self._ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._waits = DeviceWaits()

    def start(self) -> None:
        """Queue the first event, after all that the stream has to do before the passes."""
        self._waits.listen()
        self._began.record()

    def stop(self) -> None:
        """Queue the second one, after the last backward pass."""
        self._ended.record()
        self._waits.stop()

    def seconds(self) -> float:
        """Seconds between the events without those of waits for other ranks.

        Waits for the second one, so ask after the host has waited for what is after it.
        """
        self._ended.synchronize()
        return self._began.elapsed_time(self._ended) / 1e3 - self._waits.seconds()


def clock_of(device: torch.device) -> Stopwatch:
    """The clock of a device that computes."""
    return DeviceClock() if device.type == "cuda" else HostClock()


@dataclass
class StepTimes:
    """This rank's busy seconds of the steps since the last comparison."""

    seconds: list[float] = field(default_factory=list)

    def add(self, seconds: float) -> None:
        """Add a step's busy seconds: reading and computing, without waiting for others."""
        self.seconds.append(seconds)

    def find(self, parallel: Parallel, percent: float | None) -> list[Straggler]:
        """Find the slow ranks, slowest first, and start over. A rank's median step counts, so one pause names no one.

        Tensor and context ranks wait for each other and look alike: all of a group are named. Every rank must call this.
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


class PhaseClock:
    """Enters phases of steps on this rank."""

    def __init__(self, heartbeat: Heartbeat, device: torch.device) -> None:
        self.heartbeat = heartbeat
        self._timers = {"data": HostClock(), "forward": clock_of(device)}

    def enter(self, step: int, phase: str) -> AbstractContextManager[object]:
        """Note a phase, which is a sign of life each time.

        As a context it is timed, where it is this rank's own work.
        """
        self.heartbeat.at(step, phase)
        return self._timers.get(phase, nullcontext())

    def busy_seconds(self) -> float:
        """Seconds of this rank's own work in the newest step; waits for its passes on a device."""
        return sum(timer.seconds() for timer in self._timers.values())
