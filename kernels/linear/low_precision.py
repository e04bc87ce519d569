"""`linear` by a weight with a recipe: operands of 8 or 4 bits in all three products (kernels/low_precision)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from amfm.kernels.common.weight_gradients import GradientSum, compute_later, is_split
from amfm.kernels.common.weight_gradients import weight_gradient as wide_gradient
from amfm.kernels.low_precision.products import (
    Kept,
    input_gradient,
    keep_columns,
    keep_gradient,
    output,
    weight_gradient,
)
from amfm.kernels.low_precision.recipe import Recipe


def low_precision_linear(x: Tensor, weight_OI: Tensor, recipe: Recipe, total: GradientSum | None) -> Tensor:
    """x [..., I] times the transpose of weight [O, I] -> [..., O], in the dtype of x.

    Kept for backward: the codes of x along the tokens, with `weight_gradient: bf16` x itself, and the weight.
    """
    product: Tensor = _LowPrecisionLinear.apply(x, weight_OI, recipe, total)
    return product


def low_precision_gradients(
    x: Tensor, weight_OI: Tensor, grad: Tensor, recipe: Recipe, total: GradientSum | None
) -> tuple[Tensor, Tensor | None]:
    """As `linear_gradients`: of x, and of the weight, None if it lands in `total` or is computed later."""
    is_wide = recipe.weight_gradient == "bf16"
    grad_x, kept = input_gradient(grad.flatten(0, -2), weight_OI, recipe, keep=not is_wide)
    saved = (x,) if is_wide else keep_columns(x.flatten(0, -2), recipe)
    return grad_x.to(x.dtype).view(x.shape), _weights_half(saved, kept, grad, weight_OI, recipe, total)


class _LowPrecisionLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor, recipe: Recipe, total: GradientSum | None) -> Tensor:
        ctx.recipe, ctx.total, ctx.shape, ctx.dtype = recipe, total, x.shape, x.dtype
        is_wide = recipe.weight_gradient == "bf16"
        keep = ctx.needs_input_grad[1]
        y_RO, kept = output(x.flatten(0, -2), weight_OI, recipe, keep=keep and not is_wide)
        ctx.save_for_backward(weight_OI, *((x,) if keep and is_wide else kept))
        return y_RO.view(*x.shape[:-1], len(weight_OI))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        weight_OI, *saved = ctx.saved_tensors
        grad_RO, recipe = grad.flatten(0, -2), ctx.recipe
        needs_x, needs_weight, *_ = ctx.needs_input_grad
        is_wide = recipe.weight_gradient == "bf16"
        grad_x = grad_weight = None
        kept: Kept = ()
        if needs_x:
            grad_x, kept = input_gradient(grad_RO, weight_OI, recipe, keep=needs_weight and not is_wide)
            grad_x = grad_x.to(ctx.dtype).view(ctx.shape)
        elif not is_wide:
            kept = keep_gradient(grad_RO, recipe)
        if needs_weight:
            grad_weight = _weights_half(tuple(saved), kept, grad, weight_OI, recipe, ctx.total)
        return grad_x, grad_weight, None, None


def _weights_half(
    saved: Kept, kept: Kept, grad: Tensor, weight_OI: Tensor, recipe: Recipe, total: GradientSum | None
) -> Tensor | None:
    """The weight's gradient, from what was kept of x and of its gradient; None if it lands in `total` or is left for later."""
    compute: Callable[[], Tensor | None]
    if recipe.weight_gradient == "bf16":
        (x,) = saved
        assert x is not None
        compute = partial(wide_gradient, x, weight_OI, grad, total)
    else:
        compute = partial(weight_gradient, kept, saved, grad[..., 0].numel(), weight_OI.dtype, recipe, total)
    if is_split(weight_OI):
        compute_later([weight_OI], lambda: [compute()])
        return None
    return compute()
