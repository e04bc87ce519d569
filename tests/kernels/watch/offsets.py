"""Offsets that 32 bits may not hold, found at small sizes in Triton's interpreter.

A kernel that multiplies two 32-bit integers on the way to an address is right at every size that a test can have, and reads
somewhere else where the product passes 2^31 (61,000 tokens of a wide projection are enough). So here the limit is lower: what
is computed in 32 bits on the way to an address may be no larger than a few times the largest dimension of what the kernel is given,
as an index is. An offset is a product of an index and a stride, far above it, and kernels compute these in 64 bits. Places inside a
tile are free, times a stride too: tiles have at most 256 rows.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import TensorHandle

from amfm.kernels.runtime.interpreter import replace_methods

FAR = 2**31
# Indices of padded rows, tiles and blocks lie behind the largest dimension, but not far.
SLACK, LEAST = 8, 128
# Neighbours of a place, such as the tokens before it that a convolution reads.
NEAR = 16
UNITS = (1, 2, 4, 8, 16)
# Operations that make a larger integer, and those that only pass one on.
_MAKES = ("add", "sub", "mul", "shl")
_PASSES = (
    "sdiv", "udiv", "srem", "urem", "minsi", "minui", "maxsi", "maxui", "and", "or", "xor", "lshr", "ashr", "select",
    "int_cast", "reshape", "trans", "gather", "expand_dims", "broadcast", "splat", "unsplat",
)  # fmt: skip


@dataclass(frozen=True)
class NarrowOffset:
    """The first number of its function that was computed in 32 bits on the way to an address and is above the limit."""

    kernel: str
    place: str
    peak: int
    limit: int


class OffsetWatch:
    """What launches inside the block did: `narrow` offsets, kernels `seen`, and those given a tensor that is `far` apart."""

    def __init__(self) -> None:
        self.found: dict[tuple[str, str], NarrowOffset] = {}
        self.seen: set[str] = set()
        self.far: set[str] = set()
        self._kernel, self._limit = "", 0

    @property
    def narrow(self) -> list[NarrowOffset]:
        """All that was found, by place."""
        return sorted(self.found.values(), key=lambda each: (each.place, each.kernel))

    def begin(self, kernel: str, arguments: dict[str, Any]) -> None:
        """Note a launch."""
        tensors = [each for each in arguments.values() if isinstance(each, torch.Tensor)]
        self._kernel = kernel
        self._limit = SLACK * max([LEAST, *(length for each in tensors for length in each.shape)])
        self.seen.add(kernel)
        if any(last_place(each) >= FAR for each in tensors):
            self.far.add(kernel)

    def passing(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        """A method of the builder, whose result remembers how large 32-bit numbers became on the way to it."""

        def passed(*operands: Any, **named: Any) -> Any:
            result = method(*operands, **named)
            handles = [each for each in operands if isinstance(each, TensorHandle)]
            peak = max((each.attr.get("peak", 0) for each in handles), default=0)
            if _stays_in_tile(name, handles):
                result.attr["lane"] = True
            elif _computes(name, handles) and result.dtype.scalar in (tl.int32, tl.uint32) and result.data.size:
                peak = max(peak, int(np.abs(result.data.astype(np.int64)).max()))
            if any("index" in each.attr for each in handles):
                result.attr["index"] = True
            if peak:
                result.attr["peak"] = peak
            return result

        return passed

    def judge(self, offset: Any) -> None:
        """Keep an offset that is added to a pointer if a part of it was too large for 32 bits."""
        peak = offset.attr.get("peak", 0)
        if peak > self._limit:
            place = _kernel_place()
            self.found.setdefault((self._kernel, place), NarrowOffset(self._kernel, place, peak, self._limit))


def _computes(name: str, operands: list[TensorHandle]) -> bool:
    """Whether the result is larger than the operands by more than a place inside a tile."""
    if name == "mul" and all(each.data.size == 1 and "index" not in each.attr for each in operands):
        # A stride, which launches pass in units of a few numbers.
        return not any(int(each.data.flat[0]) in UNITS for each in operands)
    return name in ("mul", "shl") or (name in _MAKES and not any("lane" in each.attr for each in operands))


def _stays_in_tile(name: str, operands: list[TensorHandle]) -> bool:
    """Whether the result is a place inside a tile: of one, times a stride or a few further, or of two such places."""
    others = [each for each in operands if "lane" not in each.attr]
    if len(others) == len(operands) or any("index" in each.attr or not _is_one(each.data) for each in others):
        return False
    return name not in ("add", "sub") or all(abs(int(each.data.flat[0])) <= NEAR for each in others)


def _is_one(data: Any) -> bool:
    """Whether a block holds one number in all its places."""
    return data.size == 1 or (bool(data.size) and data.min() == data.max())


def last_place(x: torch.Tensor) -> int:
    """How far a tensor's last number lies behind its first, in numbers."""
    return sum((length - 1) * stride for length, stride in zip(x.shape, x.stride())) if x.numel() else 0


def _kernel_place() -> str:
    """Folder, file and function of the kernel's code that is being interpreted."""
    frame = sys._getframe(2)
    while "/triton/" in frame.f_code.co_filename or frame.f_code.co_filename.endswith(
        ("offsets.py", "quick/interpreter.py", "quick/operators.py")
    ):
        assert frame.f_back is not None
        frame = frame.f_back
    return f"{'/'.join(Path(frame.f_code.co_filename).parts[-2:])}:{frame.f_code.co_name}"


@contextmanager
def watch_offsets() -> Iterator[OffsetWatch]:
    """Inside, launches are watched; they must come from one thread."""
    watch, builder = OffsetWatch(), interpreter.interpreter_builder
    run, add, arange = interpreter.GridExecutor.__call__, builder.create_addptr, builder.create_make_range

    def watched_run(self: Any, *arguments: Any, **named: Any) -> Any:
        watch.begin(self.fn.__name__, dict(zip(self.arg_names, arguments)) | named)
        return run(self, *arguments, **named)

    def watched_add(pointer: Any, offset: Any) -> Any:
        watch.judge(offset)
        return add(pointer, offset)

    def marked_range(*given: Any) -> Any:
        made = arange(*given)
        made.attr["lane"] = True
        return made

    methods = {
        f"create_{name}": watch.passing(name, getattr(builder, f"create_{name}"))
        for name in _MAKES + _PASSES
        if hasattr(builder, f"create_{name}")
    }

    def indexed(method: Callable[..., Any]) -> Callable[..., Any]:
        def made(*given: Any) -> Any:
            result = method(*given)
            result.attr["index"] = True
            return result

        return made

    for name in ("get_program_id", "masked_load", "load"):
        methods[f"create_{name}"] = indexed(getattr(builder, f"create_{name}"))
    methods |= {"create_addptr": watched_add, "create_make_range": marked_range}
    with replace_methods(builder, methods), replace_methods(interpreter.GridExecutor, {"__call__": watched_run}):
        yield watch
