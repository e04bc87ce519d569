"""Experts whose products take operands of 8 or 4 bits (kernels/low_precision), emulated, one expert after the other.

Formulas as in README.md, each operand quantised from the wide numbers along what its product sums over. An expert's
rows are its own matrix: no run along the tokens has rows of two experts, and its nvfp4 has its own factors. Rows of
zeros, which fill slots, change no scale of another row but are in the runs along the tokens after the last. What
kernels store between two products (h, v, dh, and w a for d_down) is rounded to the dtype of x, as they do
(triton_codes.py).

    h = q(P x) q(up)^T          y = P^T q(w a) q(down)^T                       runs along rows
    v = q(g) q(down)            dx = P^T q(dh) q(up)
    d_down = q(g)^T q(w a)      d_up = q(dh)^T q(P x)                          runs along the tokens
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from amfm.kernels.common.weight_gradients import (
    GradientSum,
    compute_later,
    gradient_sums_of,
    is_split,
    make_or_accumulate,
)
from amfm.kernels.low_precision.emulated import input_gradient, output, quantize_columns, weight_gradient
from amfm.kernels.low_precision.formats import RUN, Quantized, quantize
from amfm.kernels.low_precision.recipe import ExpertRecipes, Recipe, RecipeName
from amfm.kernels.moe.torch_loop import (
    activate,
    activation_backward,
    count_rows,
    loop_weight_gradients,
    open_activation,
    return_rows,
    take_rows,
    take_weights,
)
from amfm.kernels.swiglu.gate import find_gate


def makes_codes(name: RecipeName, width: int, activation: str) -> bool:
    """Whether kernels make codes of activations, and of hidden rows' gradients, where they make the numbers (triton_epilogues.py).

    A gated unit's halves of `width` units must begin at blocks of codes.
    """
    return name == "fp8_block" and (find_gate(activation) is None or width % RUN[name] == 0)


def feed_forward(
    x_RD: Tensor,
    weights_S: Tensor | None,
    token_ids_S: Tensor | None,
    offsets_E: Tensor,
    up_EFD: Tensor,
    down_EDF: Tensor,
    activation: str,
    recipes: ExpertRecipes,
) -> Tensor:
    """As `torch_impl.expert_feed_forward_torch`; without token ids and weights as `grouped_feed_forward_torch`: [R, D].

    Kept for backward: x, and the hidden rows in its dtype, or as codes with `saved: fp8`. Waits for the row counts.
    """
    totals = gradient_sums_of(up_EFD, down_EDF)
    y_RD: Tensor = _Experts.apply(
        x_RD, weights_S, token_ids_S, offsets_E, up_EFD, down_EDF, activation, recipes, totals
    )
    return y_RD


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_RD: Tensor,
        weights_S: Tensor | None,
        token_ids_S: Tensor | None,
        offsets_E: Tensor,
        up_EFD: Tensor,
        down_EDF: Tensor,
        activation: str,
        recipes: ExpertRecipes,
        totals: Sequence[GradientSum] | None,
    ) -> Tensor:
        counts = count_rows(offsets_E)
        y_SD = x_RD.new_empty(sum(counts), x_RD.shape[1], dtype=torch.float32)
        hidden_SF = x_RD.new_empty(sum(counts), up_EFD.shape[1], dtype=torch.float32)
        for rows, weights, hidden, y, up, down in zip(
            take_rows(x_RD, token_ids_S, counts),
            take_weights(weights_S, counts),
            hidden_SF.split(counts),
            y_SD.split(counts),
            up_EFD,
            down_EDF,
            strict=True,
        ):
            if len(rows):
                active = activate(hidden.copy_(output(rows, up, recipes.up).to(x_RD.dtype)), activation)
                if weights is not None:
                    active.mul_(weights)
                y.copy_(output(active, down, recipes.down))
        ctx.activation, ctx.recipes, ctx.totals = activation, recipes, totals
        ctx.save_for_backward(
            x_RD, weights_S, token_ids_S, offsets_E, up_EFD, down_EDF, *_keep(hidden_SF, recipes.up, x_RD.dtype)
        )
        return return_rows(y_SD, token_ids_S, x_RD)

    @staticmethod
    def backward(ctx: Any, dy_RD: Tensor) -> tuple[Tensor | None, ...]:
        x_RD, weights_S, token_ids_S, offsets_E, up_EFD, down_EDF, *kept = ctx.saved_tensors
        counts = count_rows(offsets_E)
        hidden_SF = _restore(*kept)
        active_SF = hidden_SF.new_empty(len(hidden_SF), down_EDF.shape[2])
        dx_SD = hidden_SF.new_empty(len(hidden_SF), x_RD.shape[1])
        d_weights_S = None if weights_S is None else torch.empty_like(weights_S)
        begin = 0
        for grads, weights, hidden, up, down in zip(
            take_rows(dy_RD, token_ids_S, counts),
            take_weights(weights_S, counts),
            hidden_SF.split(counts),
            up_EFD,
            down_EDF,
            strict=True,
        ):
            place = slice(begin, begin := begin + len(grads))
            if not len(grads):
                continue
            active, factor = open_activation(hidden, ctx.activation)
            d_active = input_gradient(grads, down, ctx.recipes.down).to(x_RD.dtype).float()
            if weights is not None and d_weights_S is not None:
                d_weights_S[place] = torch.linalg.vecdot(d_active, active).to(d_weights_S.dtype)
                d_active.mul_(weights)
                active.mul_(weights)
            active_SF[place] = active.to(x_RD.dtype)
            # In place of the hidden rows, of which no other expert needs any.
            hidden.copy_(activation_backward(d_active, hidden, factor, ctx.activation).to(x_RD.dtype))
            dx_SD[place] = input_gradient(hidden, up, ctx.recipes.up)
        outer = partial(_outer, recipe=ctx.recipes.up), partial(_outer, recipe=ctx.recipes.down)
        given = dy_RD, x_RD, hidden_SF, active_SF, token_ids_S, offsets_E
        write = partial(loop_weight_gradients, *given, outer=outer)
        half = partial(make_or_accumulate, ctx.totals, [up_EFD, down_EDF], write)
        d_up: Tensor | None = None
        d_down: Tensor | None = None
        if is_split(up_EFD, down_EDF):
            compute_later([up_EFD, down_EDF], half)
        elif ctx.needs_input_grad[4] or ctx.needs_input_grad[5]:
            d_up, d_down = half()
        dx_RD = return_rows(dx_SD, token_ids_S, x_RD)
        return dx_RD, d_weights_S, None, None, d_up, d_down, None, None, None


def _outer(grad_SO: Tensor, rows_SI: Tensor, out_OI: Tensor, recipe: Recipe) -> None:
    """Write grad^T rows over an expert's rows into `out`, from float32."""
    if recipe.weight_gradient == "bf16":
        out_OI.copy_(grad_SO.t() @ rows_SI)
    else:
        out_OI.copy_(weight_gradient(grad_SO, quantize_columns(rows_SI, recipe), recipe))


def _keep(hidden_SF: Tensor, recipe: Recipe, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Hidden rows as they are saved: in `dtype`, or as codes and scales."""
    if recipe.saved == "bf16":
        return (hidden_SF.to(dtype),)
    kept = quantize(hidden_SF, "fp8_block")
    return kept.codes, kept.scales


def _restore(rows_or_codes: Tensor, scales: Tensor | None = None) -> Tensor:
    """A copy of the hidden rows [S, F] float32, out of what was saved."""
    if scales is None:
        return rows_or_codes.to(torch.float32, copy=True)
    return Quantized.of_rows("fp8_block", rows_or_codes, scales).values()
