"""Triton kernels of block-scaled products: rows by a matrix, and the sum of outer products of rows."""

# Triton reads a kernel's parameters from the call: they carry no types.
# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: ANN201, ANN202

from __future__ import annotations

import triton
import triton.language as tl

from amfm.kernels.common.tiles import add_tile
from amfm.kernels.low_precision.scaled_kernels import PIECE, TILE, whole_scale
from amfm.kernels.low_precision.triton_kernels import (
    expert_tiles,
    tile_of,
)


@triton.jit
def _load_scales(scales, row_block, piece, pieces, G: tl.constexpr, FP4: tl.constexpr):
    """Scales [128, G] of a block of rows and of runs from 4 `piece` on; zeros after the last piece."""
    lane, run = tl.arange(0, TILE), tl.arange(0, G)
    inner = (lane % 32) * 16 + lane // 32 * 4
    outer = run // 4 * PIECE + run % 4
    found = tl.load(
        scales + (row_block * pieces + piece) * PIECE + inner[:, None] + outer[None, :],
        mask=(piece + run // 4 < pieces)[None, :], other=0,
    )  # fmt: skip
    if FP4:
        found = found.to(tl.float8e4nv, bitcast=True)
    return found


@triton.jit(do_not_specialize=["rows"])
def scaled_product_kernel(
    left, left_scales, left_measured, right, right_scales, right_measured, y, sources, tiles, experts, rows, columns, inner,
    TILED: tl.constexpr, SCATTER: tl.constexpr, FP4: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y [S, columns] = rows of codes [S, inner] times the transpose of their expert's codes [columns, inner].

    SCATTER: results go to the rows that `sources` names. Grid: tiles times column blocks, column blocks innermost.
    """
    blocks = tl.cdiv(columns, BLOCK_N)
    tile, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    expert, begin, end = tile_of(tiles, tile, rows, TILED)
    if expert < experts:
        BYTES: tl.constexpr = 64 if FP4 else 128
        G: tl.constexpr = 8 if FP4 else 4
        FORMAT: tl.constexpr = "e2m1" if FP4 else "e4m3"
        stride = inner // 2 if FP4 else inner
        pieces = tl.cdiv(inner, 64 if FP4 else 128)  # of four runs
        lane, byte = tl.arange(0, TILE), tl.arange(0, BYTES)
        row = begin + lane
        is_row = row < end
        column = block * BLOCK_N + tl.arange(0, BLOCK_N)
        matrix = tl.cast(expert, tl.int64)
        right += matrix * columns * stride
        right_scales += matrix * blocks * pieces * PIECE
        left += begin * stride
        left_place = lane[:, None] * stride + byte[None, :]
        right_place = column[None, :] * stride + byte[:, None]
        total = tl.zeros((TILE, BLOCK_N), tl.float32)
        for step in range(0, tl.cdiv(stride, BYTES)):
            is_inner = byte < stride - step * BYTES
            a = tl.load(left + left_place, mask=is_row[:, None] & is_inner[None, :], other=0.0)
            b = tl.load(right + right_place, mask=(column[None, :] < columns) & is_inner[:, None], other=0.0)
            a_scales = _load_scales(left_scales, tile.to(tl.int64), step * (G // 4), pieces, G, FP4)
            b_scales = _load_scales(right_scales, block, step * (G // 4), pieces, G, FP4)
            total = tl.dot_scaled(a, a_scales, FORMAT, b, b_scales, FORMAT, total)
            left_place += BYTES
            right_place += BYTES
        if FP4:
            total = total * whole_scale(left_measured, expert) * whole_scale(right_measured, expert)
        target = tl.load(sources + row, mask=is_row, other=0).to(tl.int64) if SCATTER else row
        place = target[:, None] * columns + column[None, :]
        tl.store(y + place, total.to(y.dtype.element_ty), mask=is_row[:, None] & (column[None, :] < columns))


@triton.jit(do_not_specialize=["rows", "stride"])
def scaled_outer_kernel(
    left, left_scales, left_measured, right, right_scales, right_measured, result, offsets, experts, rows, lefts, rights, stride,
    EXPERTS: tl.constexpr, TILED: tl.constexpr, ADD: tl.constexpr, FP4: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """result [E, lefts, rights] = left right^T over each expert's tiles, zeros for an expert without rows; += with ADD.

    Both come as codes along columns, [lefts or rights, stride bytes]. Grid: (left blocks of 128, right blocks of BLOCK_N, E).
    """
    expert = tl.program_id(2)
    BYTES: tl.constexpr = 64 if FP4 else 128
    G: tl.constexpr = 8 if FP4 else 4
    FORMAT: tl.constexpr = "e2m1" if FP4 else "e4m3"
    first, last = expert_tiles(offsets, expert, experts, rows, EXPERTS, TILED)
    pieces = stride // BYTES * (G // 4)
    byte = tl.arange(0, BYTES)
    row, column = tl.program_id(0) * TILE + tl.arange(0, TILE), tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    left_place = row.to(tl.int64)[:, None] * stride + byte[None, :]
    right_place = column.to(tl.int64)[None, :] * stride + byte[:, None]
    total = tl.zeros((TILE, BLOCK_N), tl.float32)
    for tile in range(first, last):
        a = tl.load(left + left_place + tile * BYTES, mask=row[:, None] < lefts, other=0.0)
        b = tl.load(right + right_place + tile * BYTES, mask=column[None, :] < rights, other=0.0)
        a_scales = _load_scales(left_scales, tl.program_id(0).to(tl.int64), tile * (G // 4), pieces, G, FP4)
        b_scales = _load_scales(right_scales, tl.program_id(1).to(tl.int64), tile * (G // 4), pieces, G, FP4)
        total = tl.dot_scaled(a, a_scales, FORMAT, b, b_scales, FORMAT, total)
    if FP4:
        total = total * whole_scale(left_measured, expert) * whole_scale(right_measured, expert)
    matrix = expert.to(tl.int64)
    if ADD:
        corner = (matrix * lefts + tl.program_id(0) * TILE) * rights + tl.program_id(1) * BLOCK_N
        left_over = lefts - tl.program_id(0) * TILE
        add_tile(result + corner, total, left_over, rights - tl.program_id(1) * BLOCK_N, rights, TILE, BLOCK_N)
    else:
        place = (matrix * lefts + row[:, None]) * rights + column[None, :]
        mask = (row[:, None] < lefts) & (column[None, :] < rights)
        tl.store(result + place, total.to(result.dtype.element_ty), mask=mask)
