"""Experts whose products take operands of 8 or 4 bits, by kernels that multiply codes (kernels/low_precision).

Forward: codes of the rows, up; activation, weight and codes of both in one pass, down, sum over choices. Backward: codes of the
gradient along rows and columns, down; the activation's gradient, codes of it along rows and columns, up, sum; two outer products
of column codes. Weights are quantised where they are multiplied, their transposes for gradients of inputs. Of fp8_block up makes
the activation's codes itself, and one pass the codes of all that follows the activation's gradient (triton_epilogues.py).

Kept for backward: x and the hidden rows before the activation, as by `triton_experts.py`, or codes of the latter.
"""

# Triton reads a kernel's parameters from the call: they carry no types.
# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: ANN201

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from amfm.kernels.common.custom_op import fake_of
from amfm.kernels.common.gemm_precision import gemm_dtype
from amfm.kernels.common.tiles import sum_first
from amfm.kernels.common.weight_gradients import GradientSum, add_outer, compute_later, gradient_sums_of, is_split
from amfm.kernels.low_precision import triton_impl as codes
from amfm.kernels.low_precision.formats import Quantized
from amfm.kernels.low_precision.products import codes_of
from amfm.kernels.low_precision.recipe import ExpertRecipes, is_watched, note_operands
from amfm.kernels.moe import triton_epilogues as epilogues
from amfm.kernels.moe.counting_sort import SortedPairs, list_tiles, tile_bound
from amfm.kernels.moe.low_precision import makes_codes
from amfm.kernels.moe.rows.triton_impl import add_rows_triton
from amfm.kernels.moe.triton_experts import weights_half, wide_weight_gradients
from amfm.kernels.moe.triton_kernels import load_tile, open_part, row_weights
from amfm.kernels.runtime.backend import INTERPRETED
from amfm.kernels.swiglu.gate import unit_constants

OPEN_TILE = {"BLOCK_N": 32} if INTERPRETED else {"BLOCK_N": 64, "num_warps": 8}


@dataclass(frozen=True)
class Places:
    """Where sorted rows come from and go to: `sources` [S] rows of x, `pairs` [S] of sorted rows, `places` [R K] of pairs.

    Results of rows without pairs return to their sources; those of pairs are summed by token.
    """

    sources: Tensor | None
    pairs: Tensor | None = None
    places: Tensor | None = None

    @property
    def is_of_only_expert(self) -> bool:
        """Whether rows are as they come, all of one expert."""
        return self.sources is None and self.pairs is not None

    def tiles_of_products(self, tiles: codes.Tiles, recipes: ExpertRecipes) -> codes.Tiles | None:
        """The tiles that products need: none for one matrix of fp8_block, which a library may multiply."""
        return None if self.is_of_only_expert and recipes.up.name == "fp8_block" else tiles

    def product(self, by: Any, rows: Any, weight: Any, tiles: codes.Tiles | None, like_RD: Tensor) -> Tensor:
        """Rows times their experts' matrices, back where they came from: [R, D] of these tokens, in their dtype.

        `by`: who multiplies these codes (`products.codes_of`).
        """
        if self.places is None:
            y_RD: Tensor = by.product(rows, weight, like_RD.dtype, tiles, self.sources)
            return y_RD
        y_SD = by.product(rows, weight, like_RD.dtype, tiles)
        return add_rows_triton(y_SD, self.places, len(like_RD), len(self.places) // max(len(like_RD), 1))


@triton.jit(do_not_specialize=["rows"])
def open_kernel(
    v, hidden, d_hidden, active, weights, d_weights, pairs, tiles, experts, rows, width,
    SWIGLU: tl.constexpr, ALPHA: tl.constexpr, SHIFT: tl.constexpr, LIMIT: tl.constexpr,
    WEIGHTED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """As `down_backward_kernel`, where v [S, width], the gradient times down, is in memory. Partials are by sorted row."""
    blocks = tl.cdiv(width, BLOCK_N)
    expert, begin, end = load_tile(tiles, tl.program_id(0) // blocks)
    if expert < experts:
        block = tl.program_id(0) % blocks
        row = begin + tl.arange(0, BLOCK_M)
        inside = row < end
        features = width * 2 if SWIGLU else width
        hidden, d_hidden, active = hidden + begin * features, d_hidden + begin * features, active + begin * width
        lane = tl.arange(0, BLOCK_M)[:, None]
        weight = row_weights(weights, pairs, row, inside, WEIGHTED, BLOCK_M)[:, None]
        column = block * BLOCK_N + tl.arange(0, BLOCK_N)
        is_there = inside[:, None] & (column[None, :] < width)
        given = tl.load(v + begin * width + lane * width + column[None, :], mask=is_there, other=0.0).to(tl.float32)
        part = open_part(
            given, hidden, d_hidden, active, weight, lane, column, inside, width, features, SWIGLU, ALPHA, SHIFT, LIMIT
        )
        if WEIGHTED:
            tl.store(d_weights + block.to(tl.int64) * rows + row, part, mask=inside)


@torch.library.custom_op("amfm::fp8_list_tiles_triton", mutates_args=())
def list_code_tiles(offsets_E: Tensor, rows: int) -> Tensor:
    """Tiles of 128 rows, as many as `rows` rows can need."""
    return list_tiles(offsets_E.contiguous(), rows, codes.RUN)


@fake_of(list_code_tiles)
def _(given: Any) -> Tensor:
    tiles: Tensor = given.offsets_E.new_empty(tile_bound(given.rows, len(given.offsets_E), codes.RUN), 3)
    return tiles


@torch.library.custom_op("amfm::fp8_open_triton", mutates_args=())
def open_rows(
    v_SW: Tensor,
    hidden_SF: Tensor,
    weights_RK: Tensor | None,
    pairs: Tensor | None,
    tiles: Tensor,
    experts: int,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of the hidden rows, weighted activations, and gradients of weights (empty without them)."""
    rows, width = v_SW.shape
    d_hidden, active = torch.empty_like(hidden_SF), torch.empty_like(v_SW)
    blocks = triton.cdiv(width, OPEN_TILE["BLOCK_N"])
    partials = v_SW.new_empty(0 if weights_RK is None else blocks, rows, dtype=torch.float32)
    if rows:
        open_kernel[(len(tiles) * blocks,)](
            v_SW, hidden_SF, d_hidden, active, weights_RK, partials, pairs, tiles, experts, rows, width,
            **unit_constants(activation), WEIGHTED=weights_RK is not None, BLOCK_M=codes.RUN, **OPEN_TILE,
        )  # fmt: skip
    if weights_RK is None or pairs is None:
        return d_hidden, active, v_SW.new_empty(0)
    d_weights = weights_RK.new_zeros(weights_RK.numel())
    if rows:
        d_weights.index_copy_(0, pairs[:rows].long(), sum_first(partials, weights_RK.dtype))
    return d_hidden, active, d_weights.view_as(weights_RK)


@fake_of(open_rows)
def _(given: Any) -> tuple[Tensor, ...]:
    weights = given.v_SW.new_empty(0) if given.weights_RK is None else torch.empty_like(given.weights_RK)
    return torch.empty_like(given.hidden_SF), torch.empty_like(given.v_SW), weights


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_RD: Tensor,
        weights_RK: Tensor | None,
        offsets_E: Tensor,
        up_EFD: Tensor,
        down_EDF: Tensor,
        given: Places,
        rows: int,
        activation: str,
        recipes: ExpertRecipes,
        totals: Sequence[GradientSum] | None,
    ) -> Tensor:
        tiles = codes.Tiles(list_code_tiles(offsets_E, rows), offsets_E)
        parts = given.tiles_of_products(tiles, recipes)
        x_RD, weights_RK = x_RD.contiguous(), None if weights_RK is None else weights_RK.contiguous()
        up, down = codes_of(recipes.up), codes_of(recipes.down)
        x_codes, _ = up.quantize_rows(x_RD, tiles, given.sources, rows=True)
        note_operands(recipes.up, input=x_RD, weight=up_EFD.flatten(0, 1))
        note_operands(recipes.down, weight=down_EDF.flatten(0, 1))
        up_codes, choice = up.quantize_weight(up_EFD), (weights_RK, given.pairs)
        if makes_codes(recipes.up.name, down_EDF.shape[2], activation):
            saved = recipes.up.saved == "fp8"
            kept, active = epilogues.up(x_codes, up_codes, tiles, *choice, activation, x_RD, saved=saved)
        else:
            hidden_SF = up.product(x_codes, up_codes, x_RD.dtype, parts)
            active, _ = down.quantize_rows(
                hidden_SF, tiles, rows=True, activation=activation, weights=weights_RK, pairs=given.pairs
            )
            kept = (hidden_SF,)
            if recipes.up.saved == "fp8":
                kept, _ = codes.quantize_rows(hidden_SF, tiles, rows=True)
        y_RD = given.product(down, active, down.quantize_weight(down_EDF), parts, x_RD)
        ctx.given, ctx.activation, ctx.recipes, ctx.totals = given, activation, recipes, totals
        ctx.save_for_backward(x_RD, weights_RK, *tiles, up_EFD, down_EDF, *kept)
        return y_RD

    @staticmethod
    def backward(ctx: Any, dy_RD: Tensor) -> tuple[Tensor | None, ...]:
        x_RD, weights_RK, listed, offsets_E, up_EFD, down_EDF, *kept = ctx.saved_tensors
        given, tiles, dtype = ctx.given, codes.Tiles(listed, offsets_E), x_RD.dtype
        dy_RD, keep = dy_RD.contiguous(), ctx.recipes.up.weight_gradient == "same"
        up, down = codes_of(ctx.recipes.up), codes_of(ctx.recipes.down)
        grads, grad_columns = down.quantize_rows(dy_RD, tiles, given.sources, rows=True, columns=keep, gradient=True)
        note_operands(ctx.recipes.down, gradient=dy_RD)
        parts = given.tiles_of_products(tiles, ctx.recipes)
        v_SW = down.product(grads, down.quantize_weight(down_EDF, transposed=True), dtype, parts)
        rows, choice = len(v_SW), (weights_RK, given.pairs)
        # Someone who looks at operands gets them wide.
        if keep and makes_codes(ctx.recipes.up.name, down_EDF.shape[2], ctx.activation) and not is_watched():
            hidden_rows, *columns, d_weights = epilogues.open_codes(v_SW, kept, *choice, tiles, ctx.activation)
        else:
            d_hidden, active, d_weights = open_rows(
                v_SW, _restore(dtype, *kept), *choice, listed, len(offsets_E), ctx.activation
            )
            note_operands(ctx.recipes.down, input=active)
            note_operands(ctx.recipes.up, gradient=d_hidden)
            hidden_rows, hidden_columns = up.quantize_rows(d_hidden, tiles, rows=True, columns=keep, gradient=True)
            columns = [hidden_columns]
            if keep:
                columns += down.quantize_rows(active, tiles, columns=True)[1:]
                del d_hidden, active
        del v_SW
        dx_RD = given.product(up, hidden_rows, up.quantize_weight(up_EFD, transposed=True), parts, x_RD)
        weights = up_EFD, down_EDF
        if keep:
            sides = columns[0], grad_columns, columns[1]
            places = given.sources, tiles, parts
            half = partial(_weights_half, (up, down), x_RD, *places, sides, weights, rows, ctx.totals)
        elif given.is_of_only_expert:
            sides_wide = (d_hidden, x_RD), (dy_RD, active)
            half = partial(outer_weight_gradients, ctx.totals, sides_wide, up_EFD.dtype)
        else:
            wide = partial(wide_weight_gradients, dy_RD, x_RD, d_hidden, active, given.sources, offsets_E)
            half = partial(weights_half, ctx.totals, wide)
        d_up: Tensor | None = None
        d_down: Tensor | None = None
        if is_split(*weights):
            compute_later(weights, half)
        elif any(ctx.needs_input_grad[3:5]):
            d_up, d_down = half()
        return dx_RD, None if weights_RK is None else d_weights, None, d_up, d_down, None, None, None, None, None


def _restore(dtype: torch.dtype, rows_or_codes: Tensor, scales: Tensor | None = None) -> Tensor:
    """Hidden rows out of what was saved."""
    if scales is None:
        return rows_or_codes
    return Quantized.of_rows("fp8_block", rows_or_codes, scales.t()).values().to(dtype)


def _weights_half(
    by: tuple[Any, Any],
    x_RD: Tensor,
    sources: Tensor | None,
    tiles: codes.Tiles,
    parts: codes.Tiles | None,
    columns: Sequence[Any],
    weights: tuple[Tensor, Tensor],
    rows: int,
    totals: Sequence[GradientSum] | None,
) -> Sequence[Tensor | None]:
    """Gradients of up and down from column codes; None for each where they land in sums. `parts`: tiles of the products, if any."""
    hidden, grads, active = columns
    _, x_columns = by[0].quantize_rows(x_RD, tiles, sources, columns=True)
    sides = (hidden, x_columns), (grads, active)
    found = [
        each.weight_gradient(*pair, rows, weight.dtype, total, parts)
        for each, pair, weight, total in zip(by, sides, weights, totals or (None, None), strict=True)
    ]
    return [None if made is None else made.view_as(weight) for made, weight in zip(found, weights, strict=True)]


def feed_forward(
    x_RD: Tensor,
    weights_RK: Tensor | None,
    given: Places,
    offsets_E: Tensor,
    rows: int,
    up_EFD: Tensor,
    down_EDF: Tensor,
    activation: str,
    recipes: ExpertRecipes,
) -> Tensor:
    """Experts of `rows` sorted rows, as `triton_experts._forward` takes them: [R, D]."""
    totals = gradient_sums_of(up_EFD, down_EDF)
    y_RD: Tensor = _Experts.apply(
        x_RD, weights_RK, offsets_E, up_EFD, down_EDF, given, rows, activation, recipes, totals
    )
    return y_RD


def grouped(
    x_RD: Tensor, sources: Tensor | None, offsets_E: Tensor, up_EFD: Tensor, down_EDF: Tensor, activation: str,
    recipes: ExpertRecipes,
) -> Tensor:  # fmt: skip
    """As `triton_experts.grouped_feed_forward_triton`."""
    given = Places(None if sources is None else sources.int())
    return feed_forward(x_RD, None, given, offsets_E, len(x_RD), up_EFD, down_EDF, activation, recipes)


def chosen(
    x_RD: Tensor, weights_RK: Tensor, pairs: SortedPairs, rows: int, up_EFD: Tensor, down_EDF: Tensor, activation: str,
    recipes: ExpertRecipes,
) -> Tensor:  # fmt: skip
    """As `triton_experts.expert_feed_forward_triton`."""
    given = Places(pairs.tokens[:rows], pairs.pairs[:rows], pairs.places)
    offsets_E = pairs.offsets_E[: len(up_EFD)]
    return feed_forward(x_RD, weights_RK, given, offsets_E, rows, up_EFD, down_EDF, activation, recipes)


def only(
    x_SD: Tensor, weights_S1: Tensor, up_EFD: Tensor, down_EDF: Tensor, activation: str, recipes: ExpertRecipes
) -> Tensor:
    """As `triton_only_expert.only_expert_triton`, weights [S, 1]."""
    every_S, offsets_E = all_rows(x_SD)
    return feed_forward(
        x_SD, weights_S1, Places(None, every_S), offsets_E, len(x_SD), up_EFD, down_EDF, activation, recipes
    )


def multiply_rows(left_SA: Tensor, right_AB: Tensor) -> Tensor:
    """A product as `linear` makes it."""
    dtype = gemm_dtype(left_SA)
    return (left_SA.to(dtype) @ right_AB.to(dtype)).to(left_SA.dtype)


def outer_weight_gradients(
    totals: Sequence[GradientSum] | None, sides: Sequence[tuple[Tensor, Tensor]], dtype: torch.dtype
) -> Sequence[Tensor | None]:
    """left^T right of a rank's only expert, [1, A, B] of up and of down; None for each where it lands in its sum."""
    if totals is None:
        return [multiply_rows(left.t(), right)[None].to(dtype) for left, right in sides]
    for total, (left, right) in zip(totals, sides, strict=True):
        place, adds = total.take()
        if len(left):
            add_outer(place[0], adds, left, right)
        elif not adds:
            place.zero_()
    return [None, None]


def all_rows(x_SD: Tensor) -> tuple[Tensor, Tensor]:
    """Each row as its own pair, [S], and the end of the only expert's rows, [1]; int32."""
    rows = len(x_SD)
    return (
        torch.arange(rows, dtype=torch.int32, device=x_SD.device),
        torch.full((1,), rows, dtype=torch.int32, device=x_SD.device),
    )
