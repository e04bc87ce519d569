"""Memory of the simulated GPU: bytes held over time, peak by phase, and the source lines behind the peak.

How it works: a storage counts from the first operation that returns it until Python frees it, rounded up as PyTorch's
allocator rounds. So the meter sees what the caching allocator would call allocated; fragmentation and what libraries
take outside of it (CUDA context, NCCL buffers) are not there. Lines are summed again only when the peak has grown a
little, since each sum walks over all that is live.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from amfm.launch.simulate.place import current_line

# PyTorch's allocator gives multiples of this (c10/cuda/CUDACachingAllocator: kMinBlockSize).
ALLOCATION_UNIT = 512
# Lines are counted again when the peak has grown by this much.
PEAK_GROWTH = 1.001
LEAST_LINE = 1 << 20


@dataclass(frozen=True)
class Allocation:
    """A storage on the GPU: its bytes, the line that made it, the pass of a block that did (0: none), and its number."""

    size: int
    line: str
    made_in: int
    number: int


@dataclass
class MemoryMeter:
    """Bytes held now, the peak of each phase, and which lines allocated what was held at the highest peak."""

    live: dict[int, Allocation] = field(default_factory=dict)
    allocations: int = 0
    held: int = 0
    phase: str = "build"
    peaks: Counter[str] = field(default_factory=Counter)
    by_line: dict[str, int] = field(default_factory=dict)
    curve: list[tuple[int, int, str]] = field(default_factory=list)
    noted_peak: float = 0

    @property
    def peak(self) -> int:
        """The most bytes held in any phase since the last `forget_peaks`."""
        return max(self.peaks.values(), default=0)

    def enter(self, phase: str) -> None:
        """Start a phase: what is held already counts in its peak too."""
        self.phase = phase
        self.peaks[phase] = max(self.peaks[phase], self.held)

    def forget_peaks(self) -> None:
        """Reset peaks, lines and curve, for a new measurement; live tensors stay counted."""
        self.peaks.clear()
        self.by_line.clear()
        self.curve.clear()
        self.noted_peak = 0
        self.enter(self.phase)

    def record_from(self, operation: int) -> None:
        """Start the memory curve at this operation number."""
        self.curve = [(operation, self.held, self.phase)]

    def find(self, tensor: Tensor) -> Allocation | None:
        """The allocation behind a tensor; None of one on the host."""
        is_on_gpu = isinstance(tensor, FakeTensor) and tensor.fake_device.type == "cuda"
        return self.live.get(tensor.untyped_storage()._cdata) if is_on_gpu else None

    def track(self, result: Any, operation: int, made_in: int) -> None:
        """Count storages of an operation's results that are new and on the GPU, as made in that pass of a block.

        Storages, not tensors: views share one. A finalizer takes the bytes off when Python frees the storage.
        """
        for tensor in fake_tensors(result):
            if tensor.fake_device.type != "cuda":
                continue
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key in self.live:
                continue
            size = -(-storage.nbytes() // ALLOCATION_UNIT) * ALLOCATION_UNIT
            self.allocations += 1
            self.live[key] = Allocation(size, current_line(), made_in, self.allocations)
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
            self.held -= entry.size

    def _note_lines(self) -> None:
        """Remember which lines allocated what is held now, at a new peak."""
        self.noted_peak = self.held
        found: Counter[str] = Counter()
        for entry in self.live.values():
            found[entry.line] += entry.size
        self.by_line = dict(found.most_common())


def fake_tensors(result: Any) -> Iterator[FakeTensor]:
    """Fake tensors among an operation's results, nested tuples and lists included."""
    if isinstance(result, FakeTensor):
        yield result
    elif isinstance(result, (list, tuple)):
        for part in result:
            yield from fake_tensors(part)
