"""Rows by choice as Triton operations: one read of a token's row for all its copies, one sum a token, no atomics.

Every kernel walks tokens, and finds a token's rows by the places of its choices. So backward of the weighted sum reads the
gradient of a token once for the gradients of all its rows and weights, and nothing has to be cleared before but the places
that no choice has.
"""

# Triton reads a kernel's parameters from the call: they carry no types.
# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: ANN201

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from amfm.kernels.common.custom_op import differentiate, fake_of
from amfm.kernels.moe.triton_products import sum_choices
from amfm.kernels.runtime.backend import INTERPRETED
from amfm.kernels.runtime.interpreter import dot_dtype

COPY_TILE = {"BLOCK_M": 16, "BLOCK_N": 64} if INTERPRETED else {"BLOCK_M": 4, "BLOCK_N": 512}


@triton.jit(do_not_specialize=["tokens", "rows"])
def spread_rows_kernel(
    x, places, rows_SD, tokens, rows, model, choices, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """rows[places[token, choice]] = x[token] for every choice whose place is below `rows`.

    Grid: (token blocks, column blocks).
    """
    token = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (token[:, None] < tokens) & (column[None, :] < model)
    value = tl.load(x + token[:, None] * model + column[None, :], mask=inside, other=0.0)
    for choice in range(choices):
        row = tl.load(places + token * choices + choice, mask=token < tokens, other=rows).to(tl.int64)
        tl.store(rows_SD + row[:, None] * model + column[None, :], value, mask=inside & (row[:, None] < rows))


@triton.jit(do_not_specialize=["tokens", "rows"])
def combine_backward_kernel(
    d_y, rows_SD, places, weights, d_rows, d_weights, tokens, rows, model, choices,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """d_rows[place] = weight d_y[token], and d_weights[token, choice] = <d_y[token], rows[place]>, 0 without a row.

    Grid: token blocks; the cache holds a program's tokens of d_y while their choices are walked.
    """
    token = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    for choice in range(choices):
        at = token * choices + choice
        row = tl.load(places + at, mask=token < tokens, other=rows).to(tl.int64)
        weight = tl.load(weights + at, mask=token < tokens, other=0.0).to(tl.float32)
        d_weight = tl.zeros((BLOCK_M,), tl.float32)
        for begin in range(0, model, BLOCK_N):
            column = begin + tl.arange(0, BLOCK_N)
            given = (token[:, None] < tokens) & (row[:, None] < rows) & (column[None, :] < model)
            place = row[:, None] * model + column[None, :]
            gradient = tl.load(d_y + token[:, None] * model + column[None, :], mask=given, other=0.0).to(tl.float32)
            d_weight += tl.sum(gradient * tl.load(rows_SD + place, mask=given, other=0.0).to(tl.float32), axis=1)
            tl.store(d_rows + place, (gradient * weight[:, None]).to(d_rows.dtype.element_ty), mask=given)
        tl.store(d_weights + at, d_weight.to(d_weights.dtype.element_ty), mask=token < tokens)


@triton.jit(do_not_specialize=["rows"])
def clear_gaps_kernel(gaps, rows_SD, rows, model, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """rows[place] = 0 for every place that is a gap.

    Grid: place blocks; most have no gap, and write nothing.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    is_gap = tl.load(gaps + row, mask=row < rows, other=0) != 0
    for begin in range(0, model, BLOCK_N):
        column = begin + tl.arange(0, BLOCK_N)
        zero = tl.zeros((BLOCK_M, BLOCK_N), rows_SD.dtype.element_ty)
        given = is_gap[:, None] & (column[None, :] < model)
        tl.store(rows_SD + row[:, None] * model + column[None, :], zero, mask=given)


def spread_rows_triton(x_RD: Tensor, places: Tensor, count: int, top_k: int, gaps: Tensor | None = None) -> Tensor:
    """Rows [count, D], each a copy of its token's row, zeros at gaps; for float32, bfloat16 and float16."""
    dot_dtype(x_RD.dtype)  # rejects float64
    return _spread(x_RD, places, count, top_k, gaps)


def add_rows_triton(rows_SD: Tensor, places: Tensor, tokens: int, top_k: int, gaps: Tensor | None = None) -> Tensor:
    """Sums of rows [S, D] by token, [R, D], for float32, bfloat16 and float16; without gaps each row is some token's."""
    dot_dtype(rows_SD.dtype)
    return _add(rows_SD, places, tokens, top_k, gaps)


def combine_rows_triton(rows_SD: Tensor, places: Tensor, weights_RK: Tensor, gaps: Tensor | None = None) -> Tensor:
    """Weighted sums of rows [S, D] by token, [R, D], for float32, bfloat16 and float16."""
    dot_dtype(rows_SD.dtype)
    return _combine(rows_SD, places, weights_RK, gaps)


def _empty_rows(like: Tensor, rows: int, model: int, gaps: Tensor | None) -> Tensor:
    """Memory for rows, cleared at gaps, which no one writes, because what they hold is multiplied by zero later."""
    rows_SD = like.new_empty(rows, model)
    if gaps is not None and rows_SD.numel():
        grid = (triton.cdiv(rows, COPY_TILE["BLOCK_M"]),)
        clear_gaps_kernel[grid](gaps.view(torch.uint8), rows_SD, rows, model, **COPY_TILE)
    return rows_SD


@torch.library.custom_op("amfm::spread_rows_triton", mutates_args=())
def _spread(x_RD: Tensor, places: Tensor, count: int, top_k: int, gaps: Tensor | None) -> Tensor:
    """Copies [count, D] of rows of x [R, D]; places [R * K] int32."""
    x_RD = x_RD.contiguous()
    tokens, model = x_RD.shape
    rows_SD = _empty_rows(x_RD, count, model, gaps)
    if rows_SD.numel() and tokens:
        grid = (triton.cdiv(tokens, COPY_TILE["BLOCK_M"]), triton.cdiv(model, COPY_TILE["BLOCK_N"]))
        spread_rows_kernel[grid](x_RD, places, rows_SD, tokens, count, model, top_k, **COPY_TILE)
    return rows_SD


@_spread.register_fake
def _(x_RD: Tensor, places: Tensor, count: int, top_k: int, gaps: Tensor | None) -> Tensor:
    return x_RD.new_empty(count, x_RD.shape[1])


@torch.library.custom_op("amfm::add_rows_triton", mutates_args=())
def _add(rows_SD: Tensor, places: Tensor, tokens: int, top_k: int, gaps: Tensor | None) -> Tensor:
    """Each token's rows added up: [R, D]; also the gradient of what `_spread` copies, as that is of this sum.

    Gaps concern only backward.
    """
    return sum_choices(rows_SD.contiguous(), places, None, tokens, top_k)


@_add.register_fake
def _(rows_SD: Tensor, places: Tensor, tokens: int, top_k: int, gaps: Tensor | None) -> Tensor:
    return rows_SD.new_empty(tokens, rows_SD.shape[1])


def _save_add(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keep the places."""
    rows_SD, places, _, ctx.top_k, gaps = inputs
    ctx.rows = rows_SD.shape[0]
    ctx.save_for_backward(places, gaps)


def _differentiate_add(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
    """Gradient of the rows."""
    places, gaps = ctx.saved_tensors
    return _spread(d_y, places, ctx.rows, ctx.top_k, gaps), None, None, None, None


_add.register_autograd(_differentiate_add, setup_context=_save_add)


def _save_spread(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keep the places."""
    x_RD, places, _, ctx.top_k, gaps = inputs
    ctx.tokens = x_RD.shape[0]
    ctx.save_for_backward(places, gaps)


def _differentiate_spread(ctx: Any, d_rows: Tensor) -> tuple[Tensor | None, ...]:
    """Gradient of x."""
    places, gaps = ctx.saved_tensors
    return _add(d_rows, places, ctx.tokens, ctx.top_k, gaps), None, None, None, None


_spread.register_autograd(_differentiate_spread, setup_context=_save_spread)


@torch.library.custom_op("amfm::combine_rows_triton", mutates_args=())
def _combine(rows_SD: Tensor, places: Tensor, weights_RK: Tensor, gaps: Tensor | None) -> Tensor:
    """Weighted sums [R, D]; gaps concern only backward."""
    tokens, top_k = weights_RK.shape
    return sum_choices(rows_SD.contiguous(), places, weights_RK.contiguous(), tokens, top_k)


@fake_of(_combine)
def _(given: Any) -> Tensor:
    return given.rows_SD.new_empty(len(given.weights_RK), given.rows_SD.shape[1])


@torch.library.custom_op("amfm::combine_rows_triton_backward", mutates_args=())
def _combine_backward(
    d_y: Tensor, rows_SD: Tensor, places: Tensor, weights_RK: Tensor, gaps: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradients of rows and weights."""
    d_y, rows_SD, weights_RK = d_y.contiguous(), rows_SD.contiguous(), weights_RK.contiguous()
    tokens, top_k = weights_RK.shape
    rows, model = rows_SD.shape
    d_rows, d_weights = _empty_rows(rows_SD, rows, model, gaps), torch.empty_like(weights_RK)
    if weights_RK.numel():
        combine_backward_kernel[(triton.cdiv(tokens, COPY_TILE["BLOCK_M"]),)](
            d_y, rows_SD, places, weights_RK, d_rows, d_weights, tokens, rows, model, top_k, **COPY_TILE
        )
    return d_rows, d_weights


differentiate(_combine, _combine_backward, outputs=("y",), gradients=("rows_SD", "weights_RK"))
