"""Tiles of [T, size] matrices inside Triton kernels: as operands of products, or as float32 values.

Rows are tokens, which may lie apart (`stride`); columns are packed. What lies outside the matrix reads as zero.
"""

# Triton reads a kernel's parameters from the call: they carry no types.
# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: ANN201

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_operand(base, start, T, stride, size, Q: tl.constexpr, BLOCK: tl.constexpr, DOT: tl.constexpr):
    """Load rows start..start+Q and columns 0..BLOCK in the dtype of products, [Q, BLOCK]; wider would spill registers."""
    lane, column = tl.arange(0, Q)[:, None], tl.arange(0, BLOCK)[None, :]
    inside = (lane < T - start) & (column < size)
    # A wide scalar and narrow offsets: a tile of 64-bit addresses would take as many registers as the state.
    first = base + tl.cast(start, tl.int64) * stride
    return tl.load(first + (lane * stride + column), mask=inside, other=0.0).to(DOT)


@triton.jit
def load_values(base, t, T, stride, column, size):
    """Load rows `t` and columns `column`, two vectors of numbers, in float32, [Q, columns]; rows before 0 are zero too."""
    inside = ((t >= 0) & (t < T))[:, None] & (column < size)[None, :]
    return tl.load(base + t.to(tl.int64)[:, None] * stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
