"""Expert feed-forward out of Triton kernels, without asking the device how many rows per expert has.

Forward: up (gather, product, activation, weight), down, sum over choices. Backward: down with the activation's
gradient, two weight gradients, up, sum. Saved: x and the hidden rows before the activation.

The host knows how many pairs there are, not how they fall on experts: reading the counts would make each layer
wait for the device. Grids take the upper bound of tiles instead, one more for each expert, and programs without
a tile end immediately. Which rows a tile has is listed once per layer, for all products of both passes.

Rows come in one of three ways: of tokens, gathered by sorted pair, whose results are summed by weight; of rows that are in
another order, to which results return (those that ranks sent, sorted by sender); or sorted already.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor

from amfm.kernels.common.custom_op import fake_of, gradients_like
from amfm.kernels.common.tiles import sum_first
from amfm.kernels.common.weight_gradients import GradientSum, compute_later, gradient_sums_of, is_split
from amfm.kernels.moe.counting_sort import SortedPairs, list_tiles, tile_bound
from amfm.kernels.moe.triton_kernels import down_backward_kernel, up_kernel
from amfm.kernels.moe.triton_products import (
    multiply,
    multiply_outer,
    narrow_tile,
    product_config,
    product_tile,
    sum_choices,
)
from amfm.kernels.runtime.interpreter import dot_dtype
from amfm.kernels.swiglu.gate import unit_constants


@torch.library.custom_op("amfm::expert_feed_forward_triton", mutates_args=())
def _forward(
    x_RD: Tensor,
    weights_RK: Tensor | None,
    pairs: Tensor | None,
    sources: Tensor | None,
    places: Tensor | None,
    offsets_E: Tensor,
    up_EFD: Tensor,
    down_EDF: Tensor,
    activation: str,
    rows: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output [R, D], hidden rows [S, F] before the activation, and the layer's tiles.

    With weights, sources are tokens of sorted pairs; without, rows to be gathered, None if rows are sorted already. `rows`:
    those that have an expert, S; pairs after them are lost.
    """
    x_RD, up_EFD, down_EDF = x_RD.contiguous(), up_EFD.contiguous(), down_EDF.contiguous()
    weights_RK = None if weights_RK is None else weights_RK.contiguous()
    experts, features, model = up_EFD.shape
    width = down_EDF.shape[2]
    hidden, active = x_RD.new_empty(rows, features), x_RD.new_empty(rows, width)
    height = product_tile(rows, experts)["BLOCK_M"]
    bound = tile_bound(rows, experts, height)
    if not rows:
        return torch.zeros_like(x_RD), hidden, offsets_E.new_empty(bound, 3)
    tiles = list_tiles(offsets_E, rows, height)
    unit = unit_constants(activation)
    tile = narrow_tile(rows, experts) if unit["SWIGLU"] else product_tile(rows, experts)
    up_kernel[(bound * triton.cdiv(width, tile["BLOCK_N"]),)](
        x_RD, up_EFD, hidden, active, weights_RK, pairs, sources, tiles, experts, width, model,
        **unit, GATHER=sources is not None, WEIGHTED=weights_RK is not None, DOT=dot_dtype(x_RD.dtype),
        **product_config("experts_up_swiglu" if unit["SWIGLU"] else "experts_up", tile, x_RD),
    )  # fmt: skip
    if places is None:
        return multiply(active, down_EDF, sources, tiles), hidden, tiles
    y_SD = multiply(active, down_EDF, None, tiles)
    return sum_choices(y_SD, places, None, len(x_RD), len(places) // len(x_RD)), hidden, tiles


@fake_of(_forward)
def _(given: Any) -> tuple[Tensor, ...]:
    x, rows, experts = given.x_RD, given.rows, len(given.offsets_E)
    tiles = given.offsets_E.new_empty(tile_bound(rows, experts, product_tile(rows, experts)["BLOCK_M"]), 3)
    return x.new_empty(x.shape), x.new_empty(rows, given.up_EFD.shape[1]), tiles


@torch.library.custom_op("amfm::expert_feed_forward_triton_backward", mutates_args=("up_EFD_sum", "down_EDF_sum"))
def _backward(
    d_y: Tensor,
    x_RD: Tensor,
    hidden: Tensor,
    weights_RK: Tensor | None,
    pairs: Tensor | None,
    sources: Tensor | None,
    places: Tensor | None,
    offsets_E: Tensor,
    tiles: Tensor,
    up_EFD: Tensor,
    down_EDF: Tensor,
    activation: str,
    up_EFD_sum: Tensor | None,
    up_EFD_adds: bool,
    down_EDF_sum: Tensor | None,
    down_EDF_adds: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weights (empty without them), up and down (empty if they land)."""
    if not len(hidden):
        no_weights = x_RD.new_empty(0) if weights_RK is None else torch.zeros_like(weights_RK)
        d_up, d_down = _no_rows(up_EFD, up_EFD_sum, up_EFD_adds), _no_rows(down_EDF, down_EDF_sum, down_EDF_adds)
        return torch.zeros_like(x_RD), no_weights, d_up, d_down
    d_y, x_RD, up_EFD, down_EDF = (tensor.contiguous() for tensor in (d_y, x_RD, up_EFD, down_EDF))
    d_hidden, active, d_weights = _open(d_y, x_RD, hidden, weights_RK, pairs, sources, tiles, down_EDF, activation)
    into = up_EFD_sum, up_EFD_adds, down_EDF_sum, down_EDF_adds
    d_up, d_down = _weight_gradients(d_y, x_RD, d_hidden, active, sources, offsets_E, *into)
    return _input_gradient(x_RD, d_hidden, weights_RK, sources, places, tiles, up_EFD), d_weights, d_up, d_down


def _no_rows(weight: Tensor, place: Tensor | None, adds: bool) -> Tensor:
    """Gradient of experts without any rows: zeros, or empty if they land."""
    if place is None:
        return torch.zeros_like(weight)
    if not adds:
        place.zero_()
    return weight.new_empty(0)


def _open(
    d_y: Tensor,
    x_RD: Tensor,
    hidden: Tensor,
    weights_RK: Tensor | None,
    pairs: Tensor | None,
    sources: Tensor | None,
    tiles: Tensor,
    down_EDF: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of the hidden rows, activations that hold the choice's weight already, and gradients of weights (or empty)."""
    weights_RK = None if weights_RK is None else weights_RK.contiguous()
    rows, (experts, model, width) = len(hidden), down_EDF.shape
    # Of lost pairs there are no rows: parts of the others are by row, and their sums are put to their pairs.
    has_lost = weights_RK is not None and weights_RK.numel() > rows
    tile = narrow_tile(rows, experts)
    unit, blocks = unit_constants(activation), triton.cdiv(width, tile["BLOCK_N"])
    d_hidden, active = torch.empty_like(hidden), x_RD.new_empty(rows, width)
    partials = x_RD.new_empty(0 if weights_RK is None else blocks, rows, dtype=torch.float32)
    down_backward_kernel[(len(tiles) * blocks,)](
        d_y, down_EDF, hidden, d_hidden, active, weights_RK, partials, pairs, sources, tiles,
        experts, rows, width, model,
        **unit, GATHER=sources is not None, WEIGHTED=weights_RK is not None, BY_ROW=has_lost, DOT=dot_dtype(x_RD.dtype),
        **product_config("experts_down_backward_swiglu" if unit["SWIGLU"] else "experts_down_backward", tile, x_RD),
    )  # fmt: skip
    if weights_RK is None:
        return d_hidden, active, x_RD.new_empty(0)
    d_weights = sum_first(partials, weights_RK.dtype)
    if has_lost:
        assert pairs is not None, "weights come with their pairs"
        d_weights = weights_RK.new_zeros(weights_RK.numel()).index_copy_(0, pairs[:rows].long(), d_weights)
    return d_hidden, active, d_weights.view_as(weights_RK)


# Of up, then of down: the sum in which a gradient lands, if it does, and whether it is added to what is there.
Into = tuple[Tensor | None, bool, Tensor | None, bool]


def _weight_gradients(
    d_y: Tensor,
    x_RD: Tensor,
    d_hidden: Tensor,
    active: Tensor,
    sources: Tensor | None,
    offsets_E: Tensor,
    up_EFD_sum: Tensor | None,
    up_EFD_adds: bool,
    down_EDF_sum: Tensor | None,
    down_EDF_adds: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of up and down, empty if they land; rows of d_y and x are gathered while they are loaded."""
    d_down = multiply_outer(d_y, active, sources, offsets_E, down_EDF_sum, down_EDF_adds, gather_left=True)
    return multiply_outer(d_hidden, x_RD, sources, offsets_E, up_EFD_sum, up_EFD_adds, gather_left=False), d_down


# As a separate operation, for products of other operands (triton_codes.py).
wide_weight_gradients = torch.library.custom_op(
    "amfm::expert_weight_gradients_triton", _weight_gradients, mutates_args=("up_EFD_sum", "down_EDF_sum")
)


@fake_of(wide_weight_gradients)
def _(given: Any) -> tuple[Tensor, ...]:
    x, experts = given.x_RD, len(given.offsets_E)
    up = (experts, given.d_hidden.shape[1], x.shape[1]) if given.up_EFD_sum is None else (0,)
    down = (experts, x.shape[1], given.active.shape[1]) if given.down_EDF_sum is None else (0,)
    return x.new_empty(up), x.new_empty(down)


def _input_gradient(
    x_RD: Tensor,
    d_hidden: Tensor,
    weights_RK: Tensor | None,
    sources: Tensor | None,
    places: Tensor | None,
    tiles: Tensor,
    up_EFD: Tensor,
) -> Tensor:
    if weights_RK is None or places is None:
        return multiply(d_hidden, up_EFD.transpose(1, 2), sources, tiles)
    d_rows = multiply(d_hidden, up_EFD.transpose(1, 2), None, tiles)
    return sum_choices(d_rows, places, None, x_RD.shape[0], weights_RK.shape[1])


gradients_like(_backward, ("x_RD", "weights_RK", "up_EFD", "down_EDF"))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    """Keep x, the hidden rows and the tiles, which are outputs only so that they can be kept."""
    x_RD, *others, up_EFD, down_EDF, ctx.activation, _ = inputs
    ctx.totals = gradient_sums_of(up_EFD, down_EDF)
    _, hidden, tiles = output
    ctx.mark_non_differentiable(hidden, tiles)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x_RD, hidden, *others, tiles, up_EFD, down_EDF)


def _take(totals: Sequence[GradientSum] | None) -> Into:
    """Where gradients of up and down go."""
    if totals is None:
        return None, False, None, False
    up, down = totals
    return *up.take(), *down.take()


def weights_half(
    totals: Sequence[GradientSum] | None, compute: Callable[[*Into], tuple[Tensor, Tensor]]
) -> Sequence[Tensor | None]:
    """Gradients of up and down, None if they land."""
    found = compute(*_take(totals))
    return found if totals is None else (None, None)


def _differentiate(ctx: Any, d_y: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of x, weights, up and down; None throughout where the output took no gradient."""
    if d_y is None:
        return (None,) * 10
    saved = ctx.saved_tensors
    x_RD, hidden, weights_RK, pairs, sources, places, offsets_E, tiles, up_EFD, down_EDF = saved
    d_up: Tensor | None = None
    d_down: Tensor | None = None
    if is_split(up_EFD, down_EDF) and len(hidden):
        d_y, x_RD = d_y.contiguous(), x_RD.contiguous()
        d_hidden, active, d_weights = _open(
            d_y, x_RD, hidden, weights_RK, pairs, sources, tiles, down_EDF.contiguous(), ctx.activation
        )
        d_x = _input_gradient(x_RD, d_hidden, weights_RK, sources, places, tiles, up_EFD.contiguous())
        later = d_y, x_RD, d_hidden, active, sources, offsets_E
        compute_later([up_EFD, down_EDF], partial(weights_half, ctx.totals, partial(_weight_gradients, *later)))
    else:
        d_x, d_weights, d_up, d_down = _backward(d_y, *saved, ctx.activation, *_take(ctx.totals))
        if ctx.totals is not None:
            d_up = d_down = None
    return d_x, None if weights_RK is None else d_weights, None, None, None, None, d_up, d_down, None, None


_forward.register_autograd(_differentiate, setup_context=_save)


def grouped_feed_forward_triton(
    x_RD: Tensor, sources: Tensor | None, offsets_E: Tensor, up_EFD: Tensor, down_EDF: Tensor, activation: str
) -> Tensor:
    """Feed-forward of rows by expert: [R, D], for float32, bfloat16 and float16.

    x [R, D], offsets [E] int32 (sorted row after each expert's last), up [E, F, D], down [E, D, hidden]. sources [R] int32: the
    row of x at each sorted place, whose result returns there; None if rows are sorted by expert.
    """
    dot_dtype(x_RD.dtype)  # rejects float64
    return _forward(x_RD, None, None, sources, None, offsets_E, up_EFD, down_EDF, activation, len(x_RD))[0]


def expert_feed_forward_triton(
    x_RD: Tensor, weights_RK: Tensor, pairs: SortedPairs, rows: int, up_EFD: Tensor, down_EDF: Tensor, activation: str
) -> Tensor:
    """Weighted sum of each token's experts: [R, D], for float32, bfloat16 and float16.

    x [R, D], weights [R, K]; a choice's weight is that of its pair, token * K + choice. `rows`: pairs that have an expert; the
    others were sorted after them, as of one expert more.
    """
    dot_dtype(x_RD.dtype)
    sorting = pairs.pairs, pairs.tokens, pairs.places, pairs.offsets_E[: len(up_EFD)]
    return _forward(x_RD, weights_RK, *sorting, up_EFD, down_EDF, activation, rows)[0]
