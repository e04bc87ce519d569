"""Logits and cross entropy of the head, on one rank or with the vocabulary sharded over the tensor-parallel ranks.

In training the logits [B, T, V] would be the largest tensor of all, and only their cross entropy is wanted. So the loss is
computed from hidden states and weight, a part of the vocabulary at a time (kernels/linear_cross_entropy), and logits are
made only where someone asks for them: in decoding, evaluation of a task, and comparison with other implementations.

A head of an installed package gives probabilities of tokens instead of one matrix and a softmax. Its kind is a row of the
table like a mixer's, with `mixes="logits"` (config/kinds.py), and `model.head` names it. Everything
that is special to the matrix (ties, shards of the vocabulary, the fused loss) does not apply: the head sees whole rows of
the normed stream, and says log probabilities or losses. Names of its parameters begin with `head.`.
"""

from __future__ import annotations

import torch

import amfm.model.parallel  # noqa: F401  # isort: skip  # first, since it guards the import of Megatron-core
from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any

from megatron.core.tensor_parallel.mappings import (
    gather_from_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from torch import Tensor

from amfm.kernels.linear.op import linear
from amfm.kernels.linear_cross_entropy.op import CrossEntropy, linear_cross_entropy, linear_statistics
from amfm.model.config.kinds import find_kind
from amfm.model.config.schema import ModelConfig
from amfm.model.parallel.groups import ProcessGroupCollection
from amfm.model.parallel.layers import Float32Buffers

IGNORE_INDEX = -100
LOGITS_SLICE = 1 << 26  # logits that `head_choices` holds at a time


def head_logits(hidden: Tensor, weight_VD: Tensor, groups: ProcessGroupCollection) -> Tensor:
    """Compute logits [..., V] from hidden [..., D], whole on every rank of `groups.tp`, all of which must call.

    hidden must come from `enter_tensor_region`, here and in `head_cross_entropy`: each rank's rows of the weight give a part
    of its gradient, and that function sums them. Communicates the logits, by an all-gather.
    """
    local = linear(hidden, weight_VD)
    if groups.tp.size() == 1:
        return local
    logits: Tensor = gather_from_tensor_model_parallel_region(local, group=groups.tp)
    return logits


def head_choices(hidden_BTD: Tensor, weight_VD: Tensor, groups: ProcessGroupCollection) -> Tensor:
    """Find the most likely token after each hidden state, [B, T] int64; logits are made a slice of tokens at a time.

    hidden as in `head_logits`. Every rank of `groups.tp` must call. Carries no gradient.
    """
    rows = max(1, LOGITS_SLICE // (weight_VD.shape[0] * groups.tp.size()))
    parts = hidden_BTD.detach().flatten(0, 1).split(rows)
    choices = [head_logits(part, weight_VD.detach(), groups).argmax(-1) for part in parts]
    return torch.cat(choices).view(hidden_BTD.shape[:-1])


def head_cross_entropy(
    hidden_RD: Tensor,
    weight_VD: Tensor,
    labels_R: Tensor,
    groups: ProcessGroupCollection,
    *,
    z_loss_weight: float,
    backend: str,
) -> CrossEntropy:
    """Sum the negative log-likelihood of the labels under softmax(hidden W^T); labels of -100 do not count.

    hidden [R, D], weight [V of this rank, D], labels [R] int64 in the whole vocabulary. The z-loss adds z_loss_weight times
    the square of log sum exp of each counted token (Chowdhery et al. 2022, arXiv 2204.02311, section 5). Sums and not means:
    the number of counted tokens is known for the whole step only. Every rank of `groups.tp` must call, and all get the
    same sums.
    """
    if groups.tp.size() == 1:
        return linear_cross_entropy(
            hidden_RD, weight_VD, labels_R, ignore_index=IGNORE_INDEX, z_loss_weight=z_loss_weight, backend=backend
        )
    return _vocab_parallel(hidden_RD, weight_VD, labels_R, groups, z_loss_weight, backend)


def _vocab_parallel(
    hidden_RD: Tensor,
    weight_VD: Tensor,
    labels_R: Tensor,
    groups: ProcessGroupCollection,
    z_loss_weight: float,
    backend: str,
) -> CrossEntropy:
    """Cross entropy with a sharded vocabulary: no rank holds logits, and three numbers per token are reduced.

    Each rank gives the log sum exp of its rows and the label's logit, 0 where the label is another rank's row. The log sums
    are joined relative to their maximum over the ranks, which keeps exp within range and carries no gradient.
    """
    group = groups.tp
    first_row = group.rank() * weight_VD.shape[0]
    own_log_sum_R, own_logit_R = linear_statistics(hidden_RD, weight_VD, labels_R, first_row=first_row, backend=backend)
    highest_R = own_log_sum_R.detach().clone()
    torch.distributed.all_reduce(highest_R, op=torch.distributed.ReduceOp.MAX, group=group)
    # A copy, because the mapping sums in place, and the gradient of exp needs its own value.
    exp_sum_R = reduce_from_tensor_model_parallel_region((own_log_sum_R - highest_R).exp().clone(), group=group)
    log_sum_R = exp_sum_R.log() + highest_R
    label_logit_R = reduce_from_tensor_model_parallel_region(own_logit_R, group=group)
    is_valid_R = labels_R != IGNORE_INDEX
    nll_R = torch.where(is_valid_R, log_sum_R - label_logit_R, 0.0)
    total = nll_R.sum() + z_loss_weight * torch.where(is_valid_R, log_sum_R, 0.0).square().sum()
    return CrossEntropy(total=total, nll_sum=nll_R.detach().sum(), token_nll_R=nll_R.detach().float())


@dataclass(frozen=True)
class HeadOutput:
    """Without labels log_p_BTV [B, T, V]; with labels the sums of the loss, and weighted auxiliary losses by name, each a mean
    over the micro-batch, in training."""

    log_p_BTV: Tensor | None
    loss: CrossEntropy | None = None
    auxiliary: dict[str, Tensor] = field(default_factory=dict)


class Head(Float32Buffers):
    """Built as `Class(options, config)`. Parameters are replicated, with equal gradients on all ranks."""

    weight: Tensor  # one of its parameters: readers ask it for device and dtype

    @abstractmethod
    def forward(self, hidden_BTD: Tensor, labels_BT: Tensor | None = None) -> HeadOutput:
        """Read the normed stream [B, T, D]; labels [B, T] int64, -100 if there is none."""

    def init_parameter(self, name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor | None:
        """Draw the whole initial value of a parameter, float32 on the CPU; None: as init.py says for its name."""
        return None


def build_head(config: ModelConfig) -> Head | None:
    """Build the head that `model.head` names; None if the model has the matrix."""
    if config.head is None:
        return None
    kind = find_kind(config.head)
    options: Any = config.options_of(kind)
    head: Head = kind.load()(options, config)
    return head


def head_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """List names and shapes of a package's head under its own names; nothing is allocated."""
    with torch.device("meta"):
        head = build_head(config)
    return {} if head is None else {name: tuple(tensor.shape) for name, tensor in head.state_dict().items()}
