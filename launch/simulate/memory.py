"""The memory of the simulated card: every storage from its first tensor to its end, by phase, and by line at the peak."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch._subclasses.fake_tensor import FakeTensor

from launch.simulate.place import current_line

# PyTorch's allocator gives multiples of this (c10/cuda/CUDACachingAllocator: kMinBlockSize).
ALLOCATION_UNIT = 512
# Lines are counted anew when the peak has grown by this much.
PEAK_GROWTH = 1.001
LEAST_LINE = 1 << 20


@dataclass
class MemoryMeter:
    """Bytes held now, the peak of each phase, and which lines allocated what was held at the highest peak."""

    live: dict[int, tuple[int, str]] = field(default_factory=dict)
    held: int = 0
    phase: str = "build"
    peaks: Counter[str] = field(default_factory=Counter)
    by_line: dict[str, int] = field(default_factory=dict)
    curve: list[tuple[int, int, str]] = field(default_factory=list)
    noted_peak: float = 0

    @property
    def peak(self) -> int:
        """The most bytes of all phases since the last `forget_peaks`."""
        return max(self.peaks.values(), default=0)

    def enter(self, phase: str) -> None:
        """What is allocated from now on belongs to this phase; what is held counts in it too."""
        self.phase = phase
        self.peaks[phase] = max(self.peaks[phase], self.held)

    def forget_peaks(self) -> None:
        """Begin to look for peaks anew."""
        self.peaks.clear()
        self.by_line.clear()
        self.curve.clear()
        self.noted_peak = 0
        self.enter(self.phase)

    def record_from(self, operation: int) -> None:
        """The curve of memory begins with this operation."""
        self.curve = [(operation, self.held, self.phase)]

    def track(self, result: Any, operation: int) -> None:
        """Count the storages of an operation's results that are on the card and new."""
        for tensor in fake_tensors(result):
            if tensor.fake_device.type != "cuda":
                continue
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key in self.live:
                continue
            size = -(-storage.nbytes() // ALLOCATION_UNIT) * ALLOCATION_UNIT
            self.live[key] = (size, current_line())
            weakref.finalize(storage, self._free, key)
            self.held += size
            if self.held > self.peaks[self.phase]:
                self.peaks[self.phase] = self.held
                if self.held > self.noted_peak * PEAK_GROWTH:
                    self._note_lines()
            if size >= LEAST_LINE:
                self.curve.append((operation, self.held, self.phase))

    def _free(self, key: int) -> None:
        entry = self.live.pop(key, None)
        if entry is not None:
            self.held -= entry[0]

    def _note_lines(self) -> None:
        self.noted_peak = self.held
        found: Counter[str] = Counter()
        for size, line in self.live.values():
            found[line] += size
        self.by_line = dict(found.most_common())


def fake_tensors(result: Any) -> Iterator[FakeTensor]:
    """The fake tensors of an operation's result."""
    if isinstance(result, FakeTensor):
        yield result
    elif isinstance(result, (list, tuple)):
        for part in result:
            yield from fake_tensors(part)
