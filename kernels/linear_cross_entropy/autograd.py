"""What autograd and the compiler have to know of the operations, the same for PyTorch and Triton.

The loss operation returns its gradients as outputs, because a custom operation cannot hand its context a tensor
in any other way; they are marked as not differentiable. Backward multiplies them with the scalar that reaches
the loss.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef

from amfm.kernels.common.custom_op import differentiate, fake_of
from amfm.kernels.common.gradient_sum import gradient_sum_of


def sum_dtype(x: Tensor) -> torch.dtype:
    """Dtype of sums: float32, or float64 for float64."""
    return torch.promote_types(x.dtype, torch.float32)


def register_loss(operation: CustomOpDef) -> None:
    """Shapes and gradient of an operation that gives the loss, that of each row, and the gradients (or empty ones)."""
    operation.register_fake(_fake_loss)
    operation.register_autograd(_differentiate_loss, setup_context=_save_gradients)


def register_statistics(operation: CustomOpDef, backward: CustomOpDef) -> None:
    """Shapes and gradient of an operation that gives the log-sum-exp and the label's logit; `backward` computes it.

    The inputs and the log-sum-exp are kept: backward computes the logits again.
    """

    @fake_of(operation)
    def _(given: Any) -> tuple[Tensor, ...]:
        log_sum_R = given.hidden_RD.new_empty(given.labels_R.shape, dtype=sum_dtype(given.hidden_RD))
        return log_sum_R, torch.empty_like(log_sum_R)

    differentiate(operation, backward, outputs=("log_sum_R", "target_R"), gradients=("hidden_RD", "weight_VD"))


def _fake_loss(
    hidden_RD: Tensor, weight_VD: Tensor, labels_R: Tensor, ignore_index: int, z_loss_weight: float, with_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Shapes and dtypes of the loss operation: loss [], loss of each row [R], gradients of hidden and weight."""
    wide = sum_dtype(hidden_RD)
    d_hidden, d_weight = (x.new_empty(x.shape if with_grad else 0) for x in (hidden_RD, weight_VD))
    return hidden_RD.new_empty((), dtype=wide), hidden_RD.new_empty(labels_R.shape, dtype=wide), d_hidden, d_weight


def _save_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Keep the gradients that forward made.

    The inputs are not kept: backward does not need them.
    """
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[2:])
    ctx.total = gradient_sum_of(inputs[1])


def _differentiate_loss(ctx: Any, d_total: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    """Scale the gradients that forward made."""
    if d_total is None:
        return (None,) * 6
    d_hidden_RD, d_weight_VD = ctx.saved_tensors
    # A scalar tensor does not change the dtype, and is multiplied in float32.
    d_hidden_RD = d_hidden_RD * d_total
    if ctx.total is None:
        return (d_hidden_RD, d_weight_VD * d_total) + (None,) * 4
    place, adds = ctx.total.take()
    _add_scaled(place, adds, d_weight_VD, d_total)
    return (d_hidden_RD,) + (None,) * 5


def _add_scaled(place: Tensor, adds: bool, d_weight_VD: Tensor, scale: Tensor) -> None:
    """place += or = scale times a gradient, in one pass over memory and without rounding the product to the gradient's dtype.

    On a CPU product and sum round one after the other, as without a place to land in (`gradient_sum.add_outer`).
    """
    # A matrix, and not a scalar, widens what it is multiplied with.
    scale = scale.to(place.dtype).view(1, 1)
    if not adds:
        torch.mul(d_weight_VD, scale, out=place)
    elif place.device.type == "cpu":
        place.add_(d_weight_VD * scale)
    else:
        place.addcmul_(d_weight_VD, scale)
