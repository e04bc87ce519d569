"""What a rank waits for other ranks inside its passes, so that who times the passes can leave it out.

A rank that waits for a slow one is as slow, and by whole passes all would look alike. On a CPU the host waits; on a GPU the stream
that computes does, so two events stand around each wait in that stream, and are read when the passes are over.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_listening: list[Waits] = []  # of this process, since a GPU's backward pass runs in a separate thread


class Waits(ABC):
    """Notes waits from `listen` to `stop`; `seconds` is their sum."""

    def listen(self) -> None:
        """Forget what was noted, and note from now on."""
        self.forget()
        _listening.append(self)

    def stop(self) -> None:
        """Note no more."""
        _listening.remove(self)

    @abstractmethod
    def forget(self) -> None:
        """Begin at no seconds."""

    @abstractmethod
    def begin(self) -> Any:
        """Note that a wait begins; returns what `end` takes."""

    @abstractmethod
    def end(self, begun: Any) -> None:
        """Note that it is over."""

    @abstractmethod
    def seconds(self) -> float:
        """Seconds of all waits."""


class HostWaits(Waits):
    """Waits of the host, which computes."""

    def forget(self) -> None:
        """Begin at no seconds."""
        self._sum = 0.0

    def begin(self) -> float:
        """Look at the clock."""
        return time.perf_counter()

    def end(self, begun: float) -> None:
        """Add what has passed."""
        self._sum += time.perf_counter() - begun

    def seconds(self) -> float:
        """Seconds of all waits."""
        return self._sum


class DeviceWaits(Waits):
    """Waits of the stream that computes, between pairs of events that are used again in each step."""

    def __init__(self) -> None:
        self._pairs: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._used = 0

    def forget(self) -> None:
        """Use the first pair again."""
        self._used = 0

    def begin(self) -> torch.cuda.Event:
        """Queue an event before the wait; returns the one for after it."""
        if self._used == len(self._pairs):
            self._pairs.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
        before, behind = self._pairs[self._used]
        self._used += 1
        before.record()
        return behind

    def end(self, begun: torch.cuda.Event) -> None:
        """Queue the event after the wait."""
        begun.record()

    def seconds(self) -> float:
        """Seconds of all waits, which must be over on the device."""
        return sum(before.elapsed_time(behind) for before, behind in self._pairs[: self._used]) / 1e3


@contextmanager
def waiting() -> Iterator[None]:
    """Around what waits for other ranks; costs nothing if no one listens."""
    if not _listening:
        yield
        return
    waits = _listening[-1]
    begun = waits.begin()
    try:
        yield
    finally:
        waits.end(begun)
