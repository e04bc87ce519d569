"""The second half of a feed-forward by a weight with a recipe that keeps hidden rows as codes (`Recipe.saved`).

Kept for backward are only the hidden rows before the activation, as e4m3 in blocks of 128 along the row (packed_rows.py), 1.01
bytes a number. Backward makes of them what the activation and the gradient of the weight need, as experts do
(kernels/moe/low_precision.py). Forward is that of both operations apart, bitwise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from amfm.kernels.common.weight_gradients import GradientSum, gradient_sum_of
from amfm.kernels.linear.op import low_precision_gradients
from amfm.kernels.low_precision.packed_rows import pack_rows, unpack_rows
from amfm.kernels.low_precision.products import input_gradient, output
from amfm.kernels.low_precision.recipe import Recipe, recipe_of

Activate = Callable[[Tensor], Tensor]


def keeps_codes(weight_OF: Tensor) -> bool:
    """Whether what is multiplied by this weight comes from hidden rows that backward passes get as codes."""
    recipe = recipe_of(weight_OF)
    return recipe is not None and recipe.saved == "fp8" and torch.is_grad_enabled()


def activated_linear(hidden: Tensor, weight_OF: Tensor, activate: Activate, *, backend: str) -> Tensor:
    """activate(hidden [..., H]) [..., F] times the transpose of weight [O, F] -> [..., O], in the dtype of hidden.

    `activate` is one of `kernels/swiglu`, for whose gradient autograd is asked. Of a weight for which `keeps_codes`.
    """
    recipe, total = recipe_of(weight_OF), gradient_sum_of(weight_OF)
    product: Tensor = _ActivatedLinear.apply(hidden, weight_OF, activate, backend, recipe, total)
    return product


class _ActivatedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight_OF: Tensor,
        activate: Activate,
        backend: str,
        recipe: Recipe,
        total: GradientSum | None,
    ) -> Tensor:
        ctx.given, ctx.backend, ctx.like = (activate, recipe, total), backend, (hidden.shape, hidden.dtype)
        y_RO, _ = output(activate(hidden).flatten(0, -2), weight_OF, recipe, keep=False)
        ctx.save_for_backward(weight_OF, pack_rows(hidden.flatten(0, -2), backend))
        return y_RO.view(*hidden.shape[:-1], len(weight_OF))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight_OF, packed = ctx.saved_tensors
        (activate, recipe, total), (shape, dtype) = ctx.given, ctx.like
        hidden = torch.empty(shape, dtype=dtype, device=grad.device)
        unpack_rows(packed, hidden.view(len(packed), -1), ctx.backend)
        with torch.enable_grad():
            active = activate(hidden.requires_grad_())
        d_weight: Tensor | None = None
        if ctx.needs_input_grad[1]:
            d_active, d_weight = low_precision_gradients(active.detach(), weight_OF, grad, recipe, total)
        else:
            d_active = input_gradient(grad.flatten(0, -2), weight_OF, recipe, keep=False)[0].view(active.shape)
        (d_hidden,) = torch.autograd.grad(active, hidden, d_active)
        return d_hidden, d_weight, None, None, None, None
