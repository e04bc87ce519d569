"""Rows of an embedding table by token, whose gradient may land in the table's sum (kernels/common/weight_gradients.py).

torch makes a table of zeros for the gradient of each micro-batch, adds to the rows of its tokens, and whoever sums gradients
reads the whole of it. Here the rows are added to the sum itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from amfm.kernels.common.weight_gradients import GradientSum, gradient_sum_of


def embedding(ids: Tensor, weight_VD: Tensor) -> Tensor:
    """Rows of the table [V, D] at ids [...] int64 -> [..., D]."""
    total = gradient_sum_of(weight_VD)
    if total is None:
        return functional.embedding(ids, weight_VD)
    rows: Tensor = _Embedding.apply(ids, weight_VD, total)
    return rows


class _Embedding(torch.autograd.Function):
    """The look-up whose gradient lands in a sum."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight_VD: Tensor, total: GradientSum) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.total = total
        return functional.embedding(ids, weight_VD)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None]:
        (ids,) = ctx.saved_tensors
        place, adds = ctx.total.take()
        grad = grad.to(place.dtype)
        if place.device.type == "cuda":
            # With repeated ids this adds in one order, by sorting them.
            (place if adds else place.zero_()).index_put_((ids,), grad, accumulate=True)
            return None, None, None
        # On a CPU a pass's rows are added up first, as in `add_outer`.
        table_VD = torch.ops.aten.embedding_dense_backward(grad, ids, len(place), -1, False)
        place.add_(table_VD) if adds else place.copy_(table_VD)
        return None, None, None
