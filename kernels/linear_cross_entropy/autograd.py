"""What autograd and the compiler have to know of the operations, the same for PyTorch and Triton."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def sum_dtype(x: Tensor) -> torch.dtype:
    """Dtype of sums: float32, or float64 for float64."""
    return torch.promote_types(x.dtype, torch.float32)


def fake_loss(
    hidden_RD: Tensor, weight_VD: Tensor, labels_R: Tensor, ignore_index: int, z_loss_weight: float, with_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Shapes of the loss, the loss of each row, and the gradients that forward makes (empty without)."""
    wide = sum_dtype(hidden_RD)
    d_hidden = torch.empty_like(hidden_RD) if with_grad else hidden_RD.new_empty(0)
    d_weight = torch.empty_like(weight_VD) if with_grad else weight_VD.new_empty(0)
    return hidden_RD.new_empty((), dtype=wide), hidden_RD.new_empty(labels_R.shape, dtype=wide), d_hidden, d_weight


def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Keep the gradients that forward made."""
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[2:])


def differentiate(ctx: Any, d_total: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    """Scale the gradients that forward made."""
    if d_total is None:
        return (None,) * 6
    d_hidden_RD, d_weight_VD = ctx.saved_tensors
    # A scalar tensor does not change the dtype, and is multiplied in float32.
    return (d_hidden_RD * d_total, d_weight_VD * d_total) + (None,) * 4


def fake_statistics(hidden_RD: Tensor, weight_VD: Tensor, labels_R: Tensor, first_row: int) -> tuple[Tensor, Tensor]:
    """Shapes of the log-sum-exp and of the label's logit."""
    log_sum_R = hidden_RD.new_empty(labels_R.shape, dtype=sum_dtype(hidden_RD))
    return log_sum_R, torch.empty_like(log_sum_R)


def fake_statistics_backward(
    d_log_sum_R: Tensor,
    d_target_R: Tensor,
    hidden_RD: Tensor,
    weight_VD: Tensor,
    labels_R: Tensor,
    log_sum_R: Tensor,
    first_row: int,
) -> tuple[Tensor, Tensor]:
    """Shapes of the gradients of hidden and weight."""
    return torch.empty_like(hidden_RD), torch.empty_like(weight_VD)


def save_statistics(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Keep the inputs and the log-sum-exp: backward computes the logits again."""
    hidden_RD, weight_VD, labels_R, ctx.first_row = inputs
    ctx.save_for_backward(hidden_RD, weight_VD, labels_R, output[0])


def differentiate_statistics(
    backward: Callable[..., tuple[Tensor, Tensor]],
) -> Callable[..., tuple[Tensor | None, ...]]:
    """The gradient of the statistics, by an operation that computes it."""

    def differentiate(ctx: Any, d_log_sum_R: Tensor, d_target_R: Tensor) -> tuple[Tensor | None, ...]:
        return (*backward(d_log_sum_R, d_target_R, *ctx.saved_tensors, ctx.first_row), None, None)

    return differentiate
