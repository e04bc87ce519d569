"""Simulated CUDA device: what torch.cuda answers in a process without one.

How it works: libraries ask torch.cuda for capability, memory, streams and events. Each question gets the answer of an
H100 or a B200 on which all work is finished at once, and each call that would block the host is reported, which is how host waits
are counted. Answers are plain values in a table rather than a subclass of anything, because torch.cuda is a module of
functions.

Memory of the simulated GPU: bytes held over time, peak by phase, and the source lines behind the peak.

How it works: a storage counts from the first operation that returns it until Python frees it, rounded up as PyTorch's
allocator rounds. So the meter sees what the caching allocator would call allocated; fragmentation and what libraries
take outside of it (CUDA context, NCCL buffers) are not there. Lines are summed again only when the peak has grown a
little, since each sum walks over all that is live.
"""

from __future__ import annotations

import contextlib
import types
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from amfm_simulate.place import current_line

GENERATOR_STATE_BYTES = 16  # of a CUDA generator: seed and offset

Wait = Callable[[str], None]


class SimulatedGpu:
    """One H100 of a node, or with `is_blackwell` one B200, as torch.cuda would describe it.

    `index`: the device's number among `count` of its node. `note_wait` is called with a name whenever the host waits
    for it.
    """

    def __init__(self, index: int, count: int, note_wait: Wait, *, is_blackwell: bool = False) -> None:
        self.index, self.count, self.note_wait = index, count, note_wait
        self.properties = types.SimpleNamespace(
            name="NVIDIA B200" if is_blackwell else "NVIDIA H100 80GB HBM3",
            major=10 if is_blackwell else 9,
            minor=0,
            total_memory=191_000_000_000 if is_blackwell else 85_000_000_000,
            multi_processor_count=148 if is_blackwell else 132,
            shared_memory_per_block_optin=232_448,
            max_threads_per_multi_processor=2048,
            warp_size=32,
            regs_per_multiprocessor=65_536,
        )
        self.stream = make_stream(self)

    def answers(self) -> dict[str, Any]:
        """Replacement for each torch.cuda function or class, by name."""
        constant = {
            "is_available": True,
            "is_initialized": True,
            "is_bf16_supported": True,
            "device_count": self.count,
            # As a device: a build without CUDA takes a bare number for a device of another accelerator.
            "current_device": torch.device("cuda", self.index),
            "get_device_capability": (self.properties.major, self.properties.minor),
            "get_device_properties": self.properties,
            "get_device_name": self.properties.name,
            "current_stream": self.stream,
            "default_stream": self.stream,
            "memory_stats": {},
        }
        silent: tuple[str, ...] = (
            "_lazy_init",
            "_lazy_call",
            "init",
            "set_device",
            "empty_cache",
            "manual_seed",
            "manual_seed_all",
        )
        silent += ("set_rng_state", "_set_rng_state_offset", "reset_peak_memory_stats")
        silent += ("reset_max_memory_allocated", "reset_max_memory_cached")
        sizes = ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved")
        answers: dict[str, Any] = {name: always(value) for name, value in constant.items()}
        answers |= {name: always(None) for name in silent} | {name: always(0) for name in sizes}
        return answers | {
            "synchronize": lambda *_, **__: self.note_wait("torch.cuda.synchronize"),
            "get_rng_state": lambda *_: torch.zeros(GENERATOR_STATE_BYTES, dtype=torch.uint8),
            "Stream": lambda *_, **__: make_stream(self),
            "Event": lambda *_, **__: make_event(self),
            "stream": lambda _: contextlib.nullcontext(),
            "device": lambda _: contextlib.nullcontext(),
            "default_generators": [torch.Generator() for _ in range(self.count)],
        }


def always(value: Any) -> Callable[..., Any]:
    """A function that returns `value` whatever its arguments."""
    return lambda *_, **__: value


class StandIn:
    """Object with the given attributes; hashable by identity, since libraries use streams as dictionary keys."""

    def __init__(self, **attributes: Any) -> None:
        self.__dict__.update(attributes)


def make_stream(gpu: SimulatedGpu) -> Any:
    """A stream on which all work is already done; only its `synchronize` counts as a wait."""
    stream: Any = StandIn(
        cuda_stream=0, stream_id=0, device=torch.device("cuda", gpu.index), device_index=gpu.index, device_type=1
    )
    stream.wait_stream = stream.wait_event = always(None)
    stream.query = always(True)
    stream.record_event = lambda event=None: event or make_event(gpu)
    stream.synchronize = lambda: gpu.note_wait("Stream.synchronize")
    return stream


def make_event(gpu: SimulatedGpu) -> Any:
    """An event that has already happened; only its `synchronize` counts as a wait."""
    event: Any = StandIn(record=always(None), wait=always(None), query=always(True))
    event.elapsed_time = always(1.0)
    event.synchronize = lambda: gpu.note_wait("Event.synchronize")
    return event


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
