"""Tiles of matrices inside Triton kernels: loaded as operands of products or as float32 values, added, and summed over programs.

Rows are tokens, which may be apart (`stride`); columns are packed. What is outside the matrix reads as zero. A tile of a
product is added to what is in memory a part of its columns at a time.

Programs that each walk a share of the tokens write one part of a weight's gradient; adding parts by atomics would make the
bits depend on their order. PyTorch's sum and cast are two launches and a tensor in between, `sum_parts_kernel` is one.
"""

# Triton reads a kernel's parameters from the call: they carry no types.
# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: ANN201, ANN202
# ruff: noqa: ANN201

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from amfm.kernels.runtime.backend import INTERPRETED

LARGEST_TILE = {"BLOCK_P": 16, "BLOCK_C": 64} if INTERPRETED else {"BLOCK_P": 32, "BLOCK_C": 128}


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


@triton.jit
def sum_parts_kernel(parts, total, count, columns, stride_p, stride_o, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """total [outer, columns] of parts [count, outer, columns], added in float32 and in one order, rounded once.

    Grid: outer times blocks of columns, the blocks innermost. Parts are `stride_p` apart, rows of the total `stride_o`.
    """
    blocks = tl.cdiv(columns, BLOCK_C)
    column = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    outer = (tl.program_id(0) // blocks).to(tl.int64)
    lane = tl.arange(0, BLOCK_P)
    first = parts + outer * columns + column[None, :]
    added = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for begin in range(0, count, BLOCK_P):
        part = begin + lane[:, None]
        inside = (part < count) & (column[None, :] < columns)
        added += tl.load(first + part.to(tl.int64) * stride_p, mask=inside, other=0.0)
    summed = tl.sum(added, axis=0)
    tl.store(total + outer * stride_o + column, summed.to(total.dtype.element_ty), mask=column < columns)


def grid_of(outer: int, columns: int) -> tuple[int]:
    """Programs of `sum_parts_kernel`, in one dimension: a GPU takes 65,535 of a second one, and routed rows may be
    more blocks.
    """
    return (outer * triton.cdiv(columns, LARGEST_TILE["BLOCK_C"]),)


def sum_parts(parts: Tensor, total: Tensor) -> Tensor:
    """Add parts [P, outer, columns] (float32, packed) into total [outer, columns], rows of which may be apart; returns it."""
    count, outer, columns = parts.shape
    if total.numel():
        tile = LARGEST_TILE | {"BLOCK_P": min(LARGEST_TILE["BLOCK_P"], triton.next_power_of_2(count))}
        sum_parts_kernel[grid_of(outer, columns)](
            parts, total, count, columns, outer * columns, total.stride(0), **tile
        )
    return total


def sum_first(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """Add parts [P, ...] (float32, packed) over their first dimension -> [...] in `dtype`."""
    total = parts.new_empty(parts.shape[1:], dtype=dtype)
    sum_parts(parts.view(len(parts), 1, -1), total.view(1, -1))
    return total
