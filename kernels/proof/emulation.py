"""Lets Triton's interpreter round as a GPU does: bfloat16 operands of products, tf32, and casts to the nearest value.

Why: without it the interpreter computes in float32 throughout, so tests of kernels would miss every error of
rounding that bfloat16 makes on a GPU. It replaces the interpreter's casts and products while a block runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import triton.language as tl
from triton.runtime import interpreter

from amfm.kernels.runtime.backend import INTERPRETED
from amfm.kernels.runtime.interpreter import EMULATIONS

_TF32_BITS = np.uint32(0xFFFFE000)


@contextmanager
def emulate_rounding() -> Iterator[None]:
    """Inside, kernels take the operands that they take on a GPU, rounded as there; sums of products stay float32.

    The interpreter on its own cuts float32 to bfloat16 instead of rounding it, multiplies the bit patterns of bfloat16,
    and takes tf32 for float32, so that kernels give it float32 operands. On a GPU products add up in another order, and
    tf32 operands lose their last 13 bits as here. Raises RuntimeError without Triton's interpreter.
    """
    if not INTERPRETED:
        raise RuntimeError("rounding is emulated in Triton's interpreter only; start Python with TRITON_INTERPRET=1")
    builder, convert, multiply = (
        interpreter.interpreter_builder,
        interpreter._convert_float,
        interpreter.interpreter_builder.create_dot,
    )

    def rounded(values: Any, given: Any, wanted: Any, mode: Any) -> Any:
        if (given, wanted) == (tl.float32, tl.bfloat16):
            return _to_bfloat16(values)
        return (
            _from_bfloat16(values)
            if (given, wanted) == (tl.bfloat16, tl.float32)
            else convert(values, given, wanted, mode)
        )

    def product(left: Any, right: Any, added: Any, precision: Any, *rest: Any) -> Any:
        left, right = (_operand(each, tf32=precision.name == "TF32") for each in (left, right))
        return multiply(left, right, added, precision, *rest)

    interpreter._convert_float = rounded
    builder.create_dot = product
    EMULATIONS.append(None)
    try:
        yield
    finally:
        EMULATIONS.pop()
        interpreter._convert_float = convert
        del builder.create_dot


def _operand(handle: Any, *, tf32: bool) -> Any:
    """An operand of a product as float32 values."""
    kind, values = handle.dtype.scalar, handle.data
    if kind == tl.bfloat16:
        return interpreter.TensorHandle(_from_bfloat16(values), tl.float32)
    if kind == tl.float32 and tf32:
        return interpreter.TensorHandle((_bits(values) & _TF32_BITS).view(np.float32), tl.float32)
    return handle


def _bits(values: npt.NDArray[Any]) -> npt.NDArray[np.uint32]:
    """The bit patterns of float32 values."""
    return np.ascontiguousarray(values).view(np.uint32)


def _to_bfloat16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Bits of the nearest bfloat16, of the even one where two are as near; NaN stays NaN."""
    bits = _bits(values)
    nearest = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), np.uint32(0x7FC0), nearest).astype(np.uint16)


def _from_bfloat16(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """The float32 values of bfloat16 bit patterns, which are its upper half."""
    return (np.ascontiguousarray(bits).astype(np.uint32) << 16).view(np.float32)
