"""Counts what Triton kernels read, write and multiply, launch by launch, in Triton's interpreter.

How: the interpreter's methods for loads, stores, atomics and products are replaced by ones that count and then
call the original. Time in the interpreter says nothing about a GPU, but its accesses are the same, so bytes
and operations can be compared with a formula on any machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from triton.runtime import interpreter
from triton.tools.tensor_descriptor import TensorDescriptor

from amfm.kernels.runtime.backend import INTERPRETED
from amfm.kernels.runtime.interpreter import replace_methods


@dataclass
class Traffic:
    """Bytes that a launch moves to or from one argument.

    `requested`: every unmasked lane of every load and store. `distinct`: each address once, which is what memory
    moves where the GPU's cache serves a launch's repeated loads. Both count reads and writes apart.
    """

    requested_read: int = 0
    requested_written: int = 0
    distinct_read: int = 0
    distinct_written: int = 0


@dataclass
class Launch:
    """One launch of a kernel: what it moved by argument, and the operations of its products, padding included."""

    kernel: str
    traffic: dict[str, Traffic] = field(default_factory=dict)
    dot_flops: int = 0
    loads: int = 0
    stores: int = 0
    dots: int = 0

    @property
    def requested_bytes(self) -> int:
        """Bytes that the programs asked for, which the cache has to serve."""
        return sum(each.requested_read + each.requested_written for each in self.traffic.values())

    @property
    def distinct_bytes(self) -> int:
        """Bytes that memory must move for this launch, whatever the cache holds within it."""
        return sum(each.distinct_read + each.distinct_written for each in self.traffic.values())


class _Region:
    """The memory after arguments that share it, and at which of its bytes the element that is read or written began."""

    def __init__(self, name: str, storage: torch.UntypedStorage) -> None:
        self.name = name
        self.begin, self.size = storage.data_ptr(), storage.nbytes()
        self.read = np.zeros(self.size, dtype=bool)
        self.written = np.zeros(self.size, dtype=bool)

    def holds(self, address: int) -> bool:
        """Whether an address is in this memory."""
        return self.begin <= address < self.begin + self.size


class _Counter:
    """Sees every access of the launch in progress."""

    def __init__(self) -> None:
        self.launches: list[Launch] = []
        self.regions: list[_Region] = []
        self.element_bytes: dict[str, int] = {}

    def begin(self, kernel: str, arguments: dict[str, Any]) -> None:
        """Start counting a launch, with fresh memories of its arguments."""
        self.launches.append(Launch(kernel))
        self.regions = [_Region(name, storage) for name, storage in memories_of(arguments)]

    def end(self) -> None:
        """Finish a launch: its distinct bytes are known now."""
        for region in self.regions:
            traffic = self.launches[-1].traffic.get(region.name)
            if traffic is not None:
                traffic.distinct_read = int(region.read.sum()) * self.element_bytes[region.name]
                traffic.distinct_written = int(region.written.sum()) * self.element_bytes[region.name]
        self.regions = []

    def access(self, pointers: Any, mask: Any, *, write: bool) -> None:
        """Count the lanes of a load or store that the mask lets through."""
        launch = self.launches[-1]
        if write:
            launch.stores += 1
        else:
            launch.loads += 1
        addresses = pointers.data[np.broadcast_to(mask.data.astype(bool), pointers.data.shape)].astype(np.int64)
        if not addresses.size:
            return
        element = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        region = next((each for each in self.regions if each.holds(int(addresses[0]))), None)
        assert region is not None, f"{launch.kernel} touches memory of none of its arguments"
        assert self.element_bytes.setdefault(region.name, element) == element, f"{region.name}: elements of two sizes"
        traffic = launch.traffic.setdefault(region.name, Traffic())
        if write:
            traffic.requested_written += addresses.size * element
            region.written[addresses - region.begin] = True
        else:
            traffic.requested_read += addresses.size * element
            region.read[addresses - region.begin] = True

    def dot(self, left: Any, right: Any) -> None:
        """Count 2 M N K of a product."""
        self.launches[-1].dots += 1
        self.launches[-1].dot_flops += 2 * left.data.size * right.data.shape[-1]


@contextmanager
def count_launches() -> Iterator[list[Launch]]:
    """Gives a list that fills with a `Launch` for every kernel that runs inside.

    Nothing outside kernels is seen: products that an operation leaves to PyTorch are not in the counts. Launches
    must come from one thread. Raises RuntimeError without Triton's interpreter.
    """
    if not INTERPRETED:
        raise RuntimeError("launches are counted in Triton's interpreter only; start Python with TRITON_INTERPRET=1")
    counter = _Counter()
    builder, run = interpreter.interpreter_builder, interpreter.GridExecutor.__call__
    load, store = builder.create_masked_load, builder.create_masked_store
    update, multiply = builder.create_atomic_rmw, builder.create_dot

    def counted_run(self: Any, *arguments: Any, **named: Any) -> Any:
        counter.element_bytes = {}
        counter.begin(self.fn.__name__, dict(zip(self.arg_names, arguments)) | named)
        result = run(self, *arguments, **named)
        counter.end()
        return result

    def counted_load(pointers: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        counter.access(pointers, mask, write=False)
        return load(pointers, mask, *rest, **named)

    def counted_store(pointers: Any, value: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        counter.access(pointers, mask, write=True)
        return store(pointers, value, mask, *rest, **named)

    def counted_update(operation: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        counter.access(pointers, mask, write=False)
        counter.access(pointers, mask, write=True)
        return update(operation, pointers, value, mask, *rest, **named)

    def counted_dot(left: Any, right: Any, *rest: Any, **named: Any) -> Any:
        counter.dot(left, right)
        return multiply(left, right, *rest, **named)

    methods: dict[str, Callable[..., Any]] = {
        "create_masked_load": counted_load,
        "create_masked_store": counted_store,
        "create_atomic_rmw": counted_update,
        "create_dot": counted_dot,
    }
    with replace_methods(builder, methods), replace_methods(interpreter.GridExecutor, {"__call__": counted_run}):
        yield counter.launches


def memories_of(arguments: dict[str, Any]) -> list[tuple[str, torch.UntypedStorage]]:
    """The memory after a launch's tensors and descriptors of tensors, each with the names of the arguments that share it."""
    memories: dict[int, tuple[list[str], torch.UntypedStorage]] = {}
    for name, value in arguments.items():
        value = value.base if isinstance(value, TensorDescriptor) else value
        if isinstance(value, torch.Tensor) and value.numel():
            storage = value.untyped_storage()
            memories.setdefault(storage.data_ptr(), ([], storage))[0].append(name)
    return [("|".join(names), storage) for names, storage in memories.values()]
