"""Logits and cross entropy of the head, on one rank or with the vocabulary cut over the tensor-parallel ranks."""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel.mappings import (
    gather_from_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from torch import Tensor

from kernels.linear.op import linear
from kernels.linear_cross_entropy.op import CrossEntropy, linear_cross_entropy
from model.groups import ProcessGroupCollection

IGNORE_INDEX = -100


def head_logits(hidden: Tensor, weight_VD: Tensor, groups: ProcessGroupCollection) -> Tensor:
    """hidden [..., D] times the head's rows of this rank -> [..., V], whole on every rank of `groups.tp`; all must call.

    hidden comes from `enter_tensor_region`, for the loss too.
    """
    local = linear(hidden, weight_VD)
    if groups.tp.size() == 1:
        return local
    logits: Tensor = gather_from_tensor_model_parallel_region(local, group=groups.tp)
    return logits


def head_cross_entropy(
    hidden_RD: Tensor,
    weight_VD: Tensor,
    labels_R: Tensor,
    groups: ProcessGroupCollection,
    *,
    z_loss_weight: float,
    backend: str,
) -> CrossEntropy:
    """Summed negative log-likelihood of the labels under softmax(hidden W^T); labels of -100 do not count.

    hidden [R, D], weight [V of this rank, D], labels [R] in the whole vocabulary. Every rank of `groups.tp` must call, and
    all get the same sums.
    """
    if groups.tp.size() == 1:
        return linear_cross_entropy(
            hidden_RD, weight_VD, labels_R, ignore_index=IGNORE_INDEX, z_loss_weight=z_loss_weight, backend=backend
        )
    return _vocab_parallel(hidden_RD, weight_VD, labels_R, groups, z_loss_weight)


def _vocab_parallel(
    hidden_RD: Tensor, weight_VD: Tensor, labels_R: Tensor, groups: ProcessGroupCollection, z_loss_weight: float
) -> CrossEntropy:
    group = groups.tp
    logits_RV = linear(hidden_RD, weight_VD)
    logits_RV = logits_RV.to(torch.promote_types(logits_RV.dtype, torch.float32))
    highest_R = logits_RV.detach().amax(dim=-1)
    torch.distributed.all_reduce(highest_R, op=torch.distributed.ReduceOp.MAX, group=group)
    exp_sum_R = (logits_RV - highest_R[:, None]).exp().sum(dim=-1)
    log_sum_R = reduce_from_tensor_model_parallel_region(exp_sum_R, group=group).log() + highest_R

    local_R = labels_R - group.rank() * weight_VD.shape[0]
    is_here_R = (local_R >= 0) & (local_R < weight_VD.shape[0])
    picked_R = logits_RV.gather(1, torch.where(is_here_R, local_R, 0)[:, None]).squeeze(1)
    label_logit_R = reduce_from_tensor_model_parallel_region(torch.where(is_here_R, picked_R, 0.0), group=group)

    is_valid_R = labels_R != IGNORE_INDEX
    nll_R = torch.where(is_valid_R, log_sum_R - label_logit_R, 0.0)
    total = nll_R.sum() + z_loss_weight * torch.where(is_valid_R, log_sum_R, 0.0).square().sum()
    return CrossEntropy(total=total, nll_sum=nll_R.detach().sum(), token_nll_R=nll_R.detach().float())
