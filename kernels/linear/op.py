"""y = x W^T for every projection of the model, in the dtype in which this machine multiplies fast, or by a weight's recipe.

Why not only torch's linear: on a CPU without bfloat16 instructions its products of bfloat16 are emulated and
ten times slower than float32 (`amfm.kernels.common.gemm_precision`). Widening both operands costs a copy and rounds less.
Weights are named [O, I] as PyTorch stores them. A weight with a recipe has operands of 8 or 4 bits in all three products
(kernels/low_precision).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from amfm.kernels.common.gemm_precision import gemm_dtype
from amfm.kernels.common.weight_gradients import (
    GradientSum,
    add_outer,
    compute_later,
    gradient_sum_of,
    is_split,
    multiplies_as_gpu,
    weight_gradient,
)
from amfm.kernels.low_precision.products import (
    Kept,
    input_gradient,
    keep_columns,
    keep_gradient,
    output,
)
from amfm.kernels.low_precision.products import (
    weight_gradient as coded_gradient,
)
from amfm.kernels.low_precision.recipe import Recipe, recipe_of


def linear(x: Tensor, weight_OI: Tensor) -> Tensor:
    """x [..., I] times the transpose of weight [O, I] -> [..., O], in the dtype of x.

    On processors that only emulate bfloat16 products the operands are widened to float32, in both passes, and the
    results rounded once; elsewhere this is torch's own linear. Where a schedule splits the backward pass, the weight's
    gradient is computed later (kernels/common/weight_gradients.py); where it has a sum, it lands there. A weight
    with a recipe is multiplied by it (kernels/low_precision).
    """
    total, recipe = gradient_sum_of(weight_OI), recipe_of(weight_OI)
    if recipe is not None:
        return low_precision_linear(x, weight_OI, recipe, total)
    if total is not None or is_split(weight_OI):
        product: Tensor = _Linear.apply(x, weight_OI, total)
        return product
    if gemm_dtype(x) == x.dtype:
        return functional.linear(x, weight_OI)
    result: Tensor = _WidenedLinear.apply(x, weight_OI)
    return result


def linear_float32(x: Tensor, weight_OI: Tensor) -> Tensor:
    """`linear` in float32 at least, [..., O]: for narrow outputs that must not be rounded, such as a router's logits.

    Saves x and the weight as they are, not the wider copies that products take. On CUDA forward takes products of bfloat16
    or float16 as they are: they are exact in float32, in which they are added up. Backward takes the float32 gradient as two
    bfloat16 halves there: products of float32 run outside of the tensor cores, at a fifteenth of their speed.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    if x.dtype == dtype:
        return linear(x, weight_OI.to(dtype))
    result: Tensor = _Float32Linear.apply(x, weight_OI, gradient_sum_of(weight_OI))
    return result


def linear_gradients(
    x: Tensor, weight_OI: Tensor, grad: Tensor, total: GradientSum | None = None, recipe: Recipe | None = None
) -> tuple[Tensor, Tensor | None]:
    """Gradients of x and of the weight, from that of `linear`'s result, multiplied in the same dtype and rounded once.

    x [..., I], weight [O, I], grad [..., O] -> gradients of the shapes and dtypes of x and of the weight; None for a weight
    whose gradient lands in `total`, or that a split pass computes later. Blocks with their own backward (fused
    projections) call it directly, with the sum and the recipe that they found in the forward pass.
    """
    if recipe is not None:
        return low_precision_gradients(x, weight_OI, grad, recipe, total)
    dtype = gemm_dtype(x)
    grad_RO = grad.flatten(0, -2).to(dtype)
    grad_x = (grad_RO @ weight_OI.to(dtype)).to(x.dtype).view(x.shape)
    return grad_x, _weights_half(x, weight_OI, grad if is_split(weight_OI) else grad_RO, total)


def _weights_half(x: Tensor, weight_OI: Tensor, grad: Tensor, total: GradientSum | None) -> Tensor | None:
    """`weight_gradient`, now or later."""
    if is_split(weight_OI):
        compute_later([weight_OI], lambda: [weight_gradient(x, weight_OI, grad, total)])
        return None
    return weight_gradient(x, weight_OI, grad, total)


class _Linear(torch.autograd.Function):
    """`linear` whose weight's gradient may land in a sum, or be left for later."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor, total: GradientSum | None) -> Tensor:
        ctx.save_for_backward(x, weight_OI)
        ctx.total = total
        dtype = gemm_dtype(x)
        return functional.linear(x.to(dtype), weight_OI.to(dtype)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight_OI = ctx.saved_tensors
        if ctx.needs_input_grad[0]:
            return *linear_gradients(x, weight_OI, grad, ctx.total), None
        return None, _weights_half(x, weight_OI, grad, ctx.total), None


class _WidenedLinear(torch.autograd.Function):
    """`linear` with float32 operands; saves x and the weight as they are, and widens them again in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight_OI)
        return functional.linear(x.float(), weight_OI.float()).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        x, weight_OI = ctx.saved_tensors
        return linear_gradients(x, weight_OI, grad)


class _Float32Linear(torch.autograd.Function):
    """`linear_float32` of narrower numbers; backward widens them again, and rounds both gradients once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor, total: GradientSum | None) -> Tensor:
        ctx.save_for_backward(x, weight_OI)
        ctx.total = total
        if multiplies_as_gpu(x.device) and weight_OI.dtype == x.dtype:
            logits = torch.mm(x.flatten(0, -2), weight_OI.t(), out_dtype=torch.float32)
            return logits.view(*x.shape[:-1], -1)
        return functional.linear(x.float(), weight_OI.float())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight_OI = ctx.saved_tensors
        grad_RO, x_RI = grad.flatten(0, -2), x.flatten(0, -2)
        grad_weight: Tensor | None = None
        if multiplies_as_gpu(x.device) and x.dtype == weight_OI.dtype == torch.bfloat16:
            halves_R2O = split_in_halves(grad_RO)
            grad_x = halves_R2O @ weight_OI.repeat(2, 1)  # added up in float32 and rounded once, by the product
            if ctx.total is None:
                both_2OI = torch.mm(halves_R2O.t(), x_RI, out_dtype=torch.float32)
                grad_weight = both_2OI.unflatten(0, (2, -1)).sum(0).to(weight_OI.dtype)
            else:
                place, adds = ctx.total.take()
                for half_RO in halves_R2O.chunk(2, 1):
                    add_outer(place, adds, half_RO, x_RI)
                    adds = True
        else:
            grad_x = grad_RO @ weight_OI.float()
            if ctx.total is None:
                grad_weight = (grad_RO.t() @ x_RI.float()).to(weight_OI.dtype)
            else:
                place, adds = ctx.total.take()
                add_outer(place, adds, grad_RO, x_RI.float())
        return grad_x.to(x.dtype).view(x.shape), grad_weight, None


def split_in_halves(wide_RO: Tensor) -> Tensor:
    """A float32 matrix as two of bfloat16 side by side, [R, 2 O]: their sum has twice the digits of one, 2^-17 of each number."""
    halves_R2O = wide_RO.new_empty(len(wide_RO), 2 * wide_RO.shape[1], dtype=torch.bfloat16)
    high_RO, low_RO = halves_R2O.chunk(2, 1)
    high_RO.copy_(wide_RO)
    torch.sub(wide_RO, high_RO, out=low_RO)
    return halves_R2O


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
    return grad_x.to(x.dtype).view(x.shape), _weights_coded_half(saved, kept, grad, weight_OI, recipe, total)


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
            grad_weight = _weights_coded_half(tuple(saved), kept, grad, weight_OI, recipe, ctx.total)
        return grad_x, grad_weight, None, None


def _weights_coded_half(
    saved: Kept, kept: Kept, grad: Tensor, weight_OI: Tensor, recipe: Recipe, total: GradientSum | None
) -> Tensor | None:
    """The weight's gradient, from what was kept of x and of its gradient; None if it lands in `total` or is left for later."""
    compute: Callable[[], Tensor | None]
    if recipe.weight_gradient == "bf16":
        (x,) = saved
        assert x is not None
        compute = partial(weight_gradient, x, weight_OI, grad, total)
    else:
        compute = partial(coded_gradient, kept, saved, grad[..., 0].numel(), weight_OI.dtype, recipe, total)
    if is_split(weight_OI):
        compute_later([weight_OI], lambda: [compute()])
        return None
    return compute()
