"""fp8_block of experts: codes made where their numbers are made, and hidden rows never read only to be quantised.

`up`: the first product's epilogue stores the hidden rows, as they are or as the codes that backward keeps, and the codes of the
weighted activation, which a product takes next. Of a gated unit a program multiplies by the gate's 128 columns, then by up's: one
after the other, since sums of both at once would spill registers. `open_codes`: the gradient of the hidden rows and the
activation again go to the next products as codes, along rows and along columns, and are never stored wide.

A tile of 128 x 128 is one block of codes in both directions. A gated unit's second half begins at a block where the width is a
multiple of 128; elsewhere `low_precision.makes_codes` says no, and separate passes make bitwise identical results (triton_codes.py).
"""

# Triton reads a kernel's parameters from the call: they carry no types.
# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: ANN201, ANN202

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from amfm.kernels.common.custom_op import fake_of
from amfm.kernels.common.silu import limit_gate, pass_limit, plain_backward, plain_unit, sigmoid, silu_backward
from amfm.kernels.common.tiles import sum_first
from amfm.kernels.low_precision.triton_impl import E4M3, RUN, ColumnCodes, RowCodes, Tiles, WeightCodes
from amfm.kernels.low_precision.triton_kernels import (
    activate,
    from_codes,
    multiply_codes,
    store_column_codes,
    store_row_codes,
)
from amfm.kernels.moe.triton_kernels import load_tile, row_weights
from amfm.kernels.swiglu.gate import find_gate, unit_constants

BLOCK = tl.constexpr(RUN)
UP = {"num_warps": 8, "num_stages": 4}
OPEN_CODES = {"num_warps": 16}


@triton.jit
def _as_stored(value, like):
    """Numbers as memory of the dtype of `like` would have them."""
    return value.to(like.dtype.element_ty).to(tl.float32)


@triton.jit
def _widen_by_bits(value):
    """Narrow numbers as float32, of bfloat16 by their bits: of two casts the compiler makes one, whose wide result it keeps."""
    if value.dtype == tl.bfloat16:
        return (value.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return value.to(tl.float32)


@triton.jit
def _store_hidden(value, hidden, scales, begin, lane, block, rows, features, is_row, inside, SAVED: tl.constexpr):
    """A tile's block of 128 columns of hidden rows, or its codes with SAVED."""
    if SAVED:
        store_row_codes(value, hidden, scales, begin, lane, block, rows, features, is_row, inside)
    else:
        place = lane[:, None] * features + (block * BLOCK + lane)[None, :]
        tl.store(hidden + begin * features + place, value.to(hidden.dtype.element_ty), mask=inside)


@triton.jit
def _load_hidden(hidden, scales, begin, lane, column, block, rows, features, is_row, inside, SAVED: tl.constexpr):
    """Some rows and columns of what `_store_hidden` stored, float32; the columns are in a block of 128."""
    found = tl.load(hidden + begin * features + lane[:, None] * features + column[None, :], mask=inside, other=0)
    if SAVED:
        scale = tl.load(scales + block.to(tl.int64) * rows + begin + lane, mask=is_row, other=0.0)
        value = from_codes(found.to(tl.int32), scale[:, None])
    else:
        value = found.to(tl.float32)
    return value


@triton.jit(do_not_specialize=["rows"])
def fp8_up_kernel(
    left, left_scales, right, right_scales, hidden, hidden_scales, active_codes, active_scales, weights, pairs, tiles,
    experts, rows, width, inner, like,
    SWIGLU: tl.constexpr, ALPHA: tl.constexpr, SHIFT: tl.constexpr, LIMIT: tl.constexpr,
    WEIGHTED: tl.constexpr, SAVED: tl.constexpr,
):  # fmt: skip
    """Hidden rows [S, F] = rows of codes [S, inner] times their expert's codes [F, inner], and codes of weight * activation [S, width].

    SAVED: the hidden rows are stored as codes too. `like`: of the dtype that they have before they are activated or quantised.
    Grid: tiles times blocks of 128 columns of `width`, these innermost.
    """
    blocks = tl.cdiv(width, BLOCK)
    expert, begin, end = load_tile(tiles, tl.program_id(0) // blocks)
    if expert < experts:
        block, lane = tl.program_id(0) % blocks, tl.arange(0, BLOCK)
        row, column = begin + lane, block * BLOCK + lane
        is_row, is_column = row < end, column < width
        inside = is_row[:, None] & is_column[None, :]
        features = width * 2 if SWIGLU else width
        right += expert * features * inner
        runs = tl.cdiv(inner, BLOCK)
        right_scales += expert * tl.cdiv(features, BLOCK) * runs
        value = multiply_codes(
            left, left_scales, right, right_scales + block * runs, row, is_row, column, is_column, rows, inner, BLOCK
        ).to(like.dtype.element_ty)
        wide = value.to(tl.float32)
        _store_hidden(wide, hidden, hidden_scales, begin, lane, block, rows, features, is_row, inside, SAVED)
        if SWIGLU:
            up = multiply_codes(
                left, left_scales, right, right_scales + (blocks + block) * runs,
                row, is_row, width + column, is_column, rows, inner, BLOCK,
            )  # fmt: skip
            up = _as_stored(up, like)
            _store_hidden(up, hidden, hidden_scales, begin, lane, blocks + block, rows, features, is_row, inside, SAVED)
            active = activate(_widen_by_bits(value), up, True, ALPHA, SHIFT, LIMIT)
        else:
            active = activate(wide, wide, False, ALPHA, SHIFT, LIMIT)
        if WEIGHTED:
            active = active * row_weights(weights, pairs, row, is_row, True, BLOCK)[:, None]
        store_row_codes(active, active_codes, active_scales, begin, lane, block, rows, width, is_row, inside)


@triton.jit
def _open(
    v, hidden, hidden_scales, weights, pairs, begin, end, lane, column, block, blocks, rows, width,
    SWIGLU: tl.constexpr, ALPHA: tl.constexpr, SHIFT: tl.constexpr, LIMIT: tl.constexpr,
    WEIGHTED: tl.constexpr, SAVED: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Of some rows and columns: v times the activation, weight * activation, gradients of up (or of the only part) and of the gate."""
    is_row = begin + lane < end
    inside = is_row[:, None] & (column < width)[None, :]
    features = width * 2 if SWIGLU else width
    weight = row_weights(weights, pairs, begin + lane, is_row, WEIGHTED, LANES)[:, None]
    first = _load_hidden(hidden, hidden_scales, begin, lane, column, block, rows, features, is_row, inside, SAVED)
    first = _as_stored(first, v)
    grad = tl.load(v + begin * width + lane[:, None] * width + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if SWIGLU:
        up = _load_hidden(
            hidden, hidden_scales, begin, lane, width + column, blocks + block, rows, features, is_row, inside, SAVED
        )
        up = _as_stored(up, v)
        gate, second = limit_gate(first, up, SHIFT, LIMIT)
        share = sigmoid(ALPHA * gate)
        active = gate * share * second
        product = grad * active
        grad = grad * weight
        d_up = pass_limit(grad * (gate * share), up, LIMIT, True)
        d_gate = pass_limit(silu_backward(grad * second, ALPHA * gate, share), first, LIMIT, False)
    else:
        active = plain_unit(first, ALPHA)
        product = grad * active
        d_up = plain_backward(grad * weight, first, ALPHA)
        d_gate = d_up
    return product, _as_stored(active * weight, v), _as_stored(d_up, v), _as_stored(d_gate, v)


@triton.jit(do_not_specialize=["rows"])
def fp8_open_kernel(
    v, hidden, hidden_scales, row_codes, row_scales, column_codes, column_scales, active_codes, active_scales,
    weights, d_weights, pairs, tiles, experts, rows, width,
    SWIGLU: tl.constexpr, ALPHA: tl.constexpr, SHIFT: tl.constexpr, LIMIT: tl.constexpr,
    WEIGHTED: tl.constexpr, SAVED: tl.constexpr,
):  # fmt: skip
    """Codes along rows and columns of the hidden rows' gradient, along columns of weight * activation, and partials of d_weights.

    v [S, width]: the gradient times down. d_weights [blocks, S]: row sums of v * activation by block of columns and sorted row. SAVED:
    hidden rows come as codes. Grid as of `fp8_up_kernel`. Codes along rows are made of half of a tile's rows at a time, or a quarter, those
    along columns of as many of its columns, which are read again from cache: whole tiles spill registers.
    """
    parts: tl.constexpr = 4 if SAVED or SWIGLU else 2
    part: tl.constexpr = BLOCK // parts
    blocks = tl.cdiv(width, BLOCK)
    tile = tl.program_id(0) // blocks
    expert, begin, end = load_tile(tiles, tile)
    if expert < experts:
        block, all_lanes = tl.program_id(0) % blocks, tl.arange(0, BLOCK)
        features = width * 2 if SWIGLU else width
        columns = block * BLOCK + all_lanes
        for side in tl.static_range(parts):
            lane = side * part + tl.arange(0, part)
            product, _, d_up, d_gate = _open(
                v, hidden, hidden_scales, weights, pairs, begin, end, lane, columns, block, blocks, rows, width,
                SWIGLU, ALPHA, SHIFT, LIMIT, WEIGHTED, SAVED, part,
            )  # fmt: skip
            is_row = begin + lane < end
            inside = is_row[:, None] & (columns < width)[None, :]
            if WEIGHTED:
                tl.store(d_weights + block.to(tl.int64) * rows + begin + lane, tl.sum(product, 1), mask=is_row)
            if SWIGLU:
                store_row_codes(
                    d_up, row_codes, row_scales, begin, lane, blocks + block, rows, features, is_row, inside
                )
            store_row_codes(d_gate, row_codes, row_scales, begin, lane, block, rows, features, is_row, inside)
        for side in tl.static_range(parts):
            column = block * BLOCK + side * part + tl.arange(0, part)
            _, active, d_up, d_gate = _open(
                v, hidden, hidden_scales, weights, pairs, begin, end, all_lanes, column, block, blocks, rows, width,
                SWIGLU, ALPHA, SHIFT, LIMIT, WEIGHTED, SAVED, BLOCK,
            )  # fmt: skip
            is_column = column < width
            store_column_codes(active, active_codes, active_scales, tile, column, width, is_column)
            if SWIGLU:
                store_column_codes(d_up, column_codes, column_scales, tile, width + column, features, is_column)
            store_column_codes(d_gate, column_codes, column_scales, tile, column, features, is_column)


def up(
    rows: RowCodes,
    weight: WeightCodes,
    tiles: Tiles,
    weights_RK: Tensor | None,
    pairs: Tensor | None,
    activation: str,
    like: Tensor,
    *,
    saved: bool,
) -> tuple[tuple[Tensor, ...], RowCodes]:
    """Hidden rows in the dtype of `like`, or with `saved` their codes and scales, and codes of the weighted activations."""
    hidden, scales, *active = _up(*rows, *weight, weights_RK, pairs, tiles.tiles, activation, like.dtype, saved)
    return (hidden, scales) if saved else (hidden,), RowCodes(*active)


@torch.library.custom_op("amfm::fp8_up_triton", mutates_args=())
def _up(
    left: Tensor,
    left_scales: Tensor,
    right: Tensor,
    right_scales: Tensor,
    weights_RK: Tensor | None,
    pairs: Tensor | None,
    tiles: Tensor,
    activation: str,
    dtype: torch.dtype,
    saved: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    experts, features, inner = right.shape
    made = hidden, scales, active, active_scales = _empty_up(left, features, activation, dtype, saved)
    rows, width = active.shape
    if rows:
        fp8_up_kernel[(len(tiles) * triton.cdiv(width, RUN),)](
            left.view(E4M3), left_scales, right.view(E4M3), right_scales, hidden, scales, active, active_scales,
            weights_RK, pairs, tiles, experts, rows, width, inner, left.new_empty(0, dtype=dtype),
            **unit_constants(activation), WEIGHTED=weights_RK is not None, SAVED=saved, **UP,
        )  # fmt: skip
    return made


def _empty_up(
    left: Tensor, features: int, activation: str, dtype: torch.dtype, saved: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, width = len(left), features // (1 if find_gate(activation) is None else 2)
    return (
        left.new_empty(rows, features, dtype=torch.uint8 if saved else dtype),
        left.new_empty((-(-features // RUN), rows) if saved else 0, dtype=torch.float32),
        left.new_empty(rows, width, dtype=torch.uint8),
        left.new_empty(-(-width // RUN), rows, dtype=torch.float32),
    )


@fake_of(_up)
def _(given: Any) -> tuple[Tensor, ...]:
    return _empty_up(given.left, given.right.shape[1], given.activation, given.dtype, given.saved)


def open_codes(
    v_SW: Tensor,
    kept: tuple[Tensor, ...],
    weights_RK: Tensor | None,
    pairs: Tensor | None,
    tiles: Tiles,
    activation: str,
) -> tuple[RowCodes, ColumnCodes, ColumnCodes, Tensor]:
    """Codes of the hidden rows' gradient along rows and columns, of activations along columns; gradients of weights (empty without them).

    `kept`: hidden rows, or their codes and scales.
    """
    hidden, *scales = kept
    made = _open_codes(
        v_SW, hidden, scales[0] if scales else None, weights_RK, pairs, tiles.tiles, len(tiles.offsets_E), activation
    )
    return RowCodes(*made[:2]), ColumnCodes(*made[2:4]), ColumnCodes(*made[4:6]), made[6]


@torch.library.custom_op("amfm::fp8_open_codes_triton", mutates_args=())
def _open_codes(
    v_SW: Tensor,
    hidden_SF: Tensor,
    scales: Tensor | None,
    weights_RK: Tensor | None,
    pairs: Tensor | None,
    tiles: Tensor,
    experts: int,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows, width = v_SW.shape
    *codes, d_weights = _empty_open(v_SW, hidden_SF, weights_RK, tiles)
    blocks = triton.cdiv(width, RUN)
    partials = v_SW.new_empty(0 if weights_RK is None else blocks, rows, dtype=torch.float32)
    if rows:
        fp8_open_kernel[(len(tiles) * blocks,)](
            v_SW, hidden_SF, scales, *codes, weights_RK, partials, pairs, tiles, experts, rows, width,
            **unit_constants(activation), WEIGHTED=weights_RK is not None, SAVED=scales is not None, **OPEN_CODES,
        )  # fmt: skip
    if weights_RK is not None and pairs is not None:
        d_weights.zero_()
        if rows:
            d_weights.view(-1).index_copy_(0, pairs[:rows].long(), sum_first(partials, weights_RK.dtype))
    return *codes, d_weights  # type: ignore[return-value]


def _empty_open(v_SW: Tensor, hidden_SF: Tensor, weights_RK: Tensor | None, tiles: Tensor) -> tuple[Tensor, ...]:
    rows, width, features = *v_SW.shape, hidden_SF.shape[1]
    return (
        v_SW.new_empty(rows, features, dtype=torch.uint8),
        v_SW.new_empty(-(-features // RUN), rows, dtype=torch.float32),
        v_SW.new_empty(len(tiles), features, RUN, dtype=torch.uint8),
        v_SW.new_empty(len(tiles), features, dtype=torch.float32),
        v_SW.new_empty(len(tiles), width, RUN, dtype=torch.uint8),
        v_SW.new_empty(len(tiles), width, dtype=torch.float32),
        v_SW.new_empty(0) if weights_RK is None else torch.empty_like(weights_RK),
    )


@fake_of(_open_codes)
def _(given: Any) -> tuple[Tensor, ...]:
    return _empty_open(given.v_SW, given.hidden_SF, given.weights_RK, given.tiles)
