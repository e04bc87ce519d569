"""`linear` by a weight with a recipe: operands of 8 or 4 bits in all three products (kernels/low_precision)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from amfm.kernels.common.gradient_sum import GradientSum, land_product
from amfm.kernels.common.split_backward import compute_later, is_split
from amfm.kernels.linear import weight_gradient as wide
from amfm.kernels.low_precision.formats import Quantized
from amfm.kernels.low_precision.products import input_gradient, output, quantize_columns, weight_gradient
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
    """As `linear_gradients`: of x, and of the weight, None where it lands in `total` or is computed later."""
    grad_x = input_gradient(grad.flatten(0, -2), weight_OI, recipe).to(x.dtype).view(x.shape)
    return grad_x, _weights_half(_keep(x, recipe), weight_OI, grad, recipe, total)


def _keep(x: Tensor, recipe: Recipe) -> tuple[Tensor | None, ...]:
    """What the weight's gradient needs of x: codes, scales and the factor of the whole, or x alone."""
    if recipe.weight_gradient == "bf16":
        return (x,)
    columns = quantize_columns(x.flatten(0, -2), recipe)
    return columns.codes, columns.scales, columns.whole


def _weights_half(
    kept: tuple[Tensor | None, ...], weight_OI: Tensor, grad: Tensor, recipe: Recipe, total: GradientSum | None
) -> Tensor | None:
    """`_weight_gradient`, now or later."""
    if is_split(weight_OI):
        compute_later([weight_OI], lambda: [_weight_gradient(kept, weight_OI, grad, recipe, total)])
        return None
    return _weight_gradient(kept, weight_OI, grad, recipe, total)


def _weight_gradient(
    kept: tuple[Tensor | None, ...], weight_OI: Tensor, grad: Tensor, recipe: Recipe, total: GradientSum | None
) -> Tensor | None:
    """The weight's gradient, or None where it was added to `total`."""
    if recipe.weight_gradient == "bf16":
        (x,) = kept
        assert x is not None
        return wide.weight_gradient(x, weight_OI, grad, total)
    codes, scales, whole = kept
    assert codes is not None and scales is not None
    columns = Quantized.of_rows(recipe.name, codes, scales, whole)
    product = weight_gradient(grad.flatten(0, -2), columns, recipe)
    if total is not None:
        land_product(total, product)
        return None
    return product.to(weight_OI.dtype)


class _LowPrecisionLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor, recipe: Recipe, total: GradientSum | None) -> Tensor:
        ctx.recipe, ctx.total, ctx.shape, ctx.dtype = recipe, total, x.shape, x.dtype
        kept = _keep(x, recipe) if ctx.needs_input_grad[1] else ()
        ctx.save_for_backward(weight_OI, *kept)
        return output(x.flatten(0, -2), weight_OI, recipe).to(x.dtype).view(*x.shape[:-1], len(weight_OI))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        weight_OI, *kept = ctx.saved_tensors
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = input_gradient(grad.flatten(0, -2), weight_OI, ctx.recipe).to(ctx.dtype).view(ctx.shape)
        if ctx.needs_input_grad[1]:
            grad_weight = _weights_half(tuple(kept), weight_OI, grad, ctx.recipe, ctx.total)
        return grad_x, grad_weight, None, None
