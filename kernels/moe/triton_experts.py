"""Expert feed-forward out of Triton kernels, without asking the device how many rows an expert has.

Forward: up (gather, product, activation, weight), down, sum over choices. Backward: down with the activation's
gradient, two weight gradients, up, sum. Saved: x and the hidden rows before the activation.

The host knows how many pairs there are, not how they fall on experts: reading the counts would make each layer
wait for the device. Grids take the upper bound of tiles instead, one more for each expert, and programs without
a tile end at once.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from kernels.backend import INTERPRETED
from kernels.interpreter import dot_dtype
from kernels.moe.grouping import Grouping
from kernels.moe.triton_kernels import (
    down_backward_kernel,
    grouped_outer_kernel,
    grouped_product_kernel,
    sum_choices_kernel,
    up_kernel,
)
from kernels.tuning import Config, config_for

# The fixed warps and stages of a product; others are candidates (`_config`).
OPTIONS = {"num_warps": 8, "num_stages": 3}
OUTER_TILE = (
    {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 32} if INTERPRETED else {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64}
)
SUM_TILE = {"BLOCK_M": 16, "BLOCK_N": 64} if INTERPRETED else {"BLOCK_M": 4, "BLOCK_N": 512}


def product_tile(rows: int, experts: int) -> dict[str, int]:
    """Tile of a product: half-height tiles for few rows an expert, where most of a full one would be padding.

    Follows from sizes alone, never from counts, which only the device knows.
    """
    if INTERPRETED:
        return {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 32}
    return {"BLOCK_M": 128 if rows >= 256 * experts else 64, "BLOCK_N": 128, "BLOCK_K": 64}


def narrow_tile(rows: int, experts: int) -> dict[str, int]:
    """Tile of a product that holds two results (gate and up) or the activation's gradient: wider ones spill registers."""
    tile = product_tile(rows, experts)
    return {**tile, "BLOCK_N": min(tile["BLOCK_N"], 64)}


def _config(kernel: str, tile: dict[str, int], x: Tensor) -> Config:
    """Configuration of a product: its tile's height and width stay, what it takes of the inner size at a time may not."""
    halved = {**tile, "BLOCK_K": max(16, tile["BLOCK_K"] // 2)}
    candidates = [tile | OPTIONS]
    candidates += [tile | {"num_warps": warps, "num_stages": stages} for warps, stages in ((8, 4), (4, 3))]
    candidates += [halved | {"num_warps": warps, "num_stages": 4} for warps in (8, 4)]
    return config_for(kernel, (x.dtype, tile["BLOCK_M"], tile["BLOCK_N"]), candidates, x.device)


def _tile_bound(rows: int, experts: int, tile: dict[str, int]) -> int:
    """Most tiles that `rows` sorted rows can need: each expert wastes less than one."""
    return triton.cdiv(rows, tile["BLOCK_M"]) + min(experts, rows)


def _product(x: Tensor, weight_EBA: Tensor, order: Tensor | None, offsets_E: Tensor, rows: int, choices: int) -> Tensor:
    """Sorted rows times the transpose of their expert's matrix: [S, B]; the matrix may be a transposed view.

    The matrix is addressed by its three strides, so that backward's transpose of `up` needs no copy.
    """
    experts, columns, inner = weight_EBA.shape
    y = x.new_empty(rows, columns)
    tile = product_tile(rows, experts)
    grid = (_tile_bound(rows, experts, tile) * triton.cdiv(columns, tile["BLOCK_N"]),)
    grouped_product_kernel[grid](
        x, weight_EBA, y, order, offsets_E, experts, columns, inner, choices, *weight_EBA.stride(),
        GATHER=order is not None, DOT=dot_dtype(x.dtype), EXPERTS=triton.next_power_of_2(experts),
        **_config("experts_product", tile, x),
    )  # fmt: skip
    return y


def _outer(
    left: Tensor, right: Tensor, order: Tensor | None, offsets_E: Tensor, choices: int, *, gather_left: bool
) -> Tensor:
    """left^T right over each expert's rows: [E, A, B]; one of the two is gathered where there is an order."""
    experts, lefts, rights = offsets_E.shape[0], left.shape[1], right.shape[1]
    result = left.new_empty(experts, lefts, rights)
    grid = (triton.cdiv(lefts, OUTER_TILE["BLOCK_M"]), triton.cdiv(rights, OUTER_TILE["BLOCK_N"]), experts)
    grouped_outer_kernel[grid](
        left, right, result, order, offsets_E, lefts, rights, choices,
        GATHER_LEFT=gather_left and order is not None, GATHER_RIGHT=not gather_left and order is not None,
        DOT=dot_dtype(left.dtype), **_config("experts_outer", OUTER_TILE, left),
    )  # fmt: skip
    return result


def _sum_choices(rows_SD: Tensor, inverse: Tensor | None, tokens: int, choices: int) -> Tensor:
    """Each token's rows added up: [R, D]; the rows themselves where nothing was gathered.

    Sums are float32, in the order of a token's choices.
    """
    if inverse is None:
        return rows_SD
    model = rows_SD.shape[1]
    y = rows_SD.new_empty(tokens, model)
    grid = (triton.cdiv(tokens, SUM_TILE["BLOCK_M"]), triton.cdiv(model, SUM_TILE["BLOCK_N"]))
    sum_choices_kernel[grid](rows_SD, inverse, y, tokens, model, choices, **SUM_TILE)
    return y


def _shape(x_RD: Tensor, weights_RK: Tensor | None, down_EDF: Tensor) -> tuple[int, int, int]:
    """Sorted rows, choices a token, inner width."""
    choices = 1 if weights_RK is None else weights_RK.shape[1]
    return x_RD.shape[0] * choices, choices, down_EDF.shape[2]


@torch.library.custom_op("amfm::expert_feed_forward_triton", mutates_args=())
def _forward(
    x_RD: Tensor,
    weights_RK: Tensor | None,
    order: Tensor | None,
    inverse: Tensor | None,
    offsets_E: Tensor,
    up_EFD: Tensor,
    down_EDF: Tensor,
    swiglu: bool,
) -> tuple[Tensor, Tensor]:
    """Output [R, D] and hidden rows [S, F] before the activation. Without order the rows are sorted already."""
    x_RD, up_EFD, down_EDF = x_RD.contiguous(), up_EFD.contiguous(), down_EDF.contiguous()
    weights_RK = None if weights_RK is None else weights_RK.contiguous()
    rows, choices, width = _shape(x_RD, weights_RK, down_EDF)
    experts, features, model = up_EFD.shape
    hidden, active = x_RD.new_empty(rows, features), x_RD.new_empty(rows, width)
    if not rows:
        return torch.empty_like(x_RD), hidden
    tile = narrow_tile(rows, experts) if swiglu else product_tile(rows, experts)
    up_kernel[(_tile_bound(rows, experts, tile) * triton.cdiv(width, tile["BLOCK_N"]),)](
        x_RD, up_EFD, hidden, active, weights_RK, order, offsets_E, experts, width, model, choices,
        SWIGLU=swiglu, GATHER=order is not None, DOT=dot_dtype(x_RD.dtype),
        EXPERTS=triton.next_power_of_2(experts), **_config("experts_up_swiglu" if swiglu else "experts_up", tile, x_RD),
    )  # fmt: skip
    y_SD = _product(active, down_EDF, None, offsets_E, rows, choices)
    return _sum_choices(y_SD, inverse, x_RD.shape[0], choices), hidden


@_forward.register_fake
def _(
    x_RD: Tensor,
    weights_RK: Tensor | None,
    order: Tensor | None,
    inverse: Tensor | None,
    offsets_E: Tensor,
    up_EFD: Tensor,
    down_EDF: Tensor,
    swiglu: bool,
) -> tuple[Tensor, Tensor]:
    rows, _, _ = _shape(x_RD, weights_RK, down_EDF)
    return torch.empty_like(x_RD, memory_format=torch.contiguous_format), x_RD.new_empty(rows, up_EFD.shape[1])


@torch.library.custom_op("amfm::expert_feed_forward_triton_backward", mutates_args=())
def _backward(
    d_y: Tensor,
    x_RD: Tensor,
    hidden: Tensor,
    weights_RK: Tensor | None,
    order: Tensor | None,
    inverse: Tensor | None,
    offsets_E: Tensor,
    up_EFD: Tensor,
    down_EDF: Tensor,
    swiglu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weights (empty without them), up and down."""
    d_y, x_RD, up_EFD, down_EDF = (tensor.contiguous() for tensor in (d_y, x_RD, up_EFD, down_EDF))
    weights_RK = None if weights_RK is None else weights_RK.contiguous()
    rows, choices, width = _shape(x_RD, weights_RK, down_EDF)
    experts, _, model = up_EFD.shape
    if not rows:
        empty = x_RD.new_empty(0) if weights_RK is None else torch.empty_like(weights_RK)
        return torch.empty_like(x_RD), empty, torch.zeros_like(up_EFD), torch.zeros_like(down_EDF)
    tile = narrow_tile(rows, experts)
    blocks = triton.cdiv(width, tile["BLOCK_N"])
    d_hidden, active = torch.empty_like(hidden), x_RD.new_empty(rows, width)
    partials = x_RD.new_empty(0 if weights_RK is None else blocks, rows, dtype=torch.float32)
    down_backward_kernel[(_tile_bound(rows, experts, tile) * blocks,)](
        d_y, down_EDF, hidden, d_hidden, active, weights_RK, partials, order, offsets_E,
        experts, rows, width, model, choices,
        SWIGLU=swiglu, GATHER=order is not None, DOT=dot_dtype(x_RD.dtype),
        EXPERTS=triton.next_power_of_2(experts),
        **_config("experts_down_backward_swiglu" if swiglu else "experts_down_backward", tile, x_RD),
    )  # fmt: skip
    # `active` holds the choice's weight already, and rows of d_y and x are gathered while they are loaded.
    d_down = _outer(d_y, active, order, offsets_E, choices, gather_left=True)
    d_up = _outer(d_hidden, x_RD, order, offsets_E, choices, gather_left=False)
    d_rows = _product(d_hidden, up_EFD.transpose(1, 2), None, offsets_E, rows, choices)
    d_x = _sum_choices(d_rows, inverse, x_RD.shape[0], choices)
    if weights_RK is None:
        return d_x, x_RD.new_empty(0), d_up, d_down
    return d_x, partials.sum(0).view_as(weights_RK).to(weights_RK.dtype), d_up, d_down


@_backward.register_fake
def _(
    d_y: Tensor,
    x_RD: Tensor,
    hidden: Tensor,
    weights_RK: Tensor | None,
    order: Tensor | None,
    inverse: Tensor | None,
    offsets_E: Tensor,
    up_EFD: Tensor,
    down_EDF: Tensor,
    swiglu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    like = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (x_RD, up_EFD, down_EDF)]
    d_weights = x_RD.new_empty(0) if weights_RK is None else weights_RK.new_empty(weights_RK.shape)
    return like[0], d_weights, like[1], like[2]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Keep x and the hidden rows, an output only so that it can be kept."""
    x_RD, weights_RK, order, inverse, offsets_E, up_EFD, down_EDF, ctx.swiglu = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x_RD, output[1], weights_RK, order, inverse, offsets_E, up_EFD, down_EDF)


def _differentiate(ctx: Any, d_y: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of x, weights, up and down; None throughout where the output took no gradient."""
    if d_y is None:
        return (None,) * 8
    saved = ctx.saved_tensors
    d_x, d_weights, d_up, d_down = _backward(d_y, *saved, ctx.swiglu)
    return d_x, None if saved[2] is None else d_weights, None, None, None, d_up, d_down, None


_forward.register_autograd(_differentiate, setup_context=_save)


def grouped_feed_forward_triton(
    x_RD: Tensor, offsets_E: Tensor, up_EFD: Tensor, down_EDF: Tensor, activation: str
) -> Tensor:
    """Feed-forward of rows sorted by expert: [R, D], for float32, bfloat16 and float16.

    x [R, D], offsets [E] int32 (row after each expert's last), up [E, F, D], down [E, D, hidden].
    """
    dot_dtype(x_RD.dtype)  # refuses float64
    return _forward(x_RD, None, None, None, offsets_E, up_EFD, down_EDF, activation == "swiglu")[0]


def expert_feed_forward_triton(
    x_RD: Tensor, weights_RK: Tensor, groups: Grouping, up_EFD: Tensor, down_EDF: Tensor, activation: str
) -> Tensor:
    """Weighted sum of each token's experts: [R, D], for float32, bfloat16 and float16.

    x [R, D], weights [R, K]; a choice's weight is that of its pair, token * K + choice.
    """
    dot_dtype(x_RD.dtype)
    places = torch.arange(groups.order.shape[0], device=groups.order.device)
    # Sorted place of each pair: the sum over a token's choices reads its rows by it.
    inverse = torch.zeros_like(places).scatter(0, groups.order, places)
    return _forward(
        x_RD, weights_RK, groups.order, inverse, groups.offsets_E, up_EFD, down_EDF, activation == "swiglu"
    )[0]
