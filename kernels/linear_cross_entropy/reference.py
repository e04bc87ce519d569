"""Cross-entropy of a linear head with all logits in memory, one row at a time: the meaning the fast paths must keep."""

from __future__ import annotations

import torch
from torch import Tensor


def linear_cross_entropy_reference(
    hidden_RD: Tensor, weight_VD: Tensor, labels_R: Tensor, *, ignore_index: int, z_loss_weight: float
) -> tuple[Tensor, Tensor]:
    """Total loss (scalar) and negative log-likelihood of each row [R], 0 where the label is `ignore_index`.

    hidden [R, D], weight [V, D], labels [R]; in the dtype of the inputs, gradients by autograd.
    """
    # Zero, but connected to both inputs: with all rows ignored the gradients are zeros and not absent.
    total = (hidden_RD.sum() + weight_VD.sum()) * 0
    token_nll = []
    for hidden, label in zip(hidden_RD, labels_R.tolist()):
        if label == ignore_index:
            token_nll.append(total.detach() * 0)
            continue
        logits_V = weight_VD @ hidden
        log_sum = logits_V.logsumexp(0)
        token_nll.append((log_sum - logits_V[label]).detach())
        total = total + log_sum - logits_V[label] + z_loss_weight * log_sum.square()
    return total, torch.stack(token_nll) if token_nll else hidden_RD.new_empty(0)


def linear_statistics_reference(
    hidden_RD: Tensor, weight_VD: Tensor, labels_R: Tensor, *, first_row: int
) -> tuple[Tensor, Tensor]:
    """Log-sum-exp over these rows of the head, and the label's logit, 0 where another shard holds it.

    The shard holds rows first_row .. first_row + V of the head; both results are [R].
    """
    logits_RV = hidden_RD @ weight_VD.T
    local_R = labels_R - first_row
    mine_R = (local_R >= 0) & (local_R < weight_VD.shape[0])
    target_R = logits_RV.gather(1, local_R.clamp(0, weight_VD.shape[0] - 1)[:, None])[:, 0]
    return logits_RV.logsumexp(1), target_R.where(mine_R, torch.zeros_like(target_R))
