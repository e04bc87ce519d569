"""Simulated CUDA device: what torch.cuda answers in a process without one.

How it works: libraries ask torch.cuda for capability, memory, streams and events. Each question gets the answer of an
H100 or a B200 on which all work is finished at once, and each call that would block the host is reported, which is how host waits
are counted. Answers are plain values in a table rather than a subclass of anything, because torch.cuda is a module of
functions.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable
from typing import Any

import torch

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
