"""The clock of a step's phases: tells the heartbeat where this rank is, and times what keeps it busy.

Reading data and the passes are a rank's own work; what it waits for in between, other ranks, is not, and slow ranks are
found only by their own work (stragglers.py).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from amfm.pretrain.monitor.heartbeat import Heartbeat
from amfm.pretrain.monitor.stragglers import HostClock, clock_of

UNTIL_UPDATE = (
    "data",
    "count",  # of valid tokens, over all ranks
    "forward",
    "reduce",
    "optimizer",
)  # phases of the step that is under way, not of the last one done


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
