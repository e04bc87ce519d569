"""Tiles of [T, size] matrices inside Triton kernels: as operands of products, or as float32 values.

Rows are tokens, which may be apart (`stride`); columns are packed. What is outside the matrix reads as zero. A tile of a
product is added to what is in memory a part of its columns at a time.
"""

# Triton reads a kernel's parameters from the call: they carry no types.
# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: ANN201, ANN202

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


@triton.jit
def halves(tile):
    """Left and right half of a tile's columns."""
    rows: tl.constexpr = tile.shape[0]
    columns: tl.constexpr = tile.shape[1]
    return tl.split(tl.permute(tl.reshape(tile, (rows, 2, columns // 2)), (0, 2, 1)))


@triton.jit
def add_tile(corner, total, rows, columns, stride, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Add a tile [BLOCK_M, BLOCK_N] to the float32 numbers from `corner` on, whose rows are `stride` apart.

    `rows`, `columns`: how many of the tile's are inside. What is there is read a quarter of a tile at a time: a whole one, or
    half of it on sm_100, would leave room for one program on a multiprocessor instead of two.
    """
    left, right = halves(total)
    first, second = halves(left)
    _add_part(corner, first, 0, rows, columns, stride, BLOCK_M, BLOCK_N)
    _add_part(corner, second, BLOCK_N // 4, rows, columns, stride, BLOCK_M, BLOCK_N)
    third, fourth = halves(right)
    _add_part(corner, third, BLOCK_N // 2, rows, columns, stride, BLOCK_M, BLOCK_N)
    _add_part(corner, fourth, 3 * BLOCK_N // 4, rows, columns, stride, BLOCK_M, BLOCK_N)


@triton.jit
def _add_part(corner, part, begin, rows, columns, stride, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Add a quarter of a tile's columns, from `begin` on."""
    row, column = tl.arange(0, BLOCK_M), begin + tl.arange(0, BLOCK_N // 4)
    place = row[:, None] * stride + column[None, :]
    mask = (row[:, None] < rows) & (column[None, :] < columns)
    part += tl.load(corner + place, mask=mask, other=0.0)
    tl.debug_barrier()  # threads that store a number need not be those that loaded it
    tl.store(corner + place, part, mask=mask)
