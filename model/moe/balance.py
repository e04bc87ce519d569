"""Auxiliary losses that balance the load of experts, over all tokens of a micro-batch wherever they are.

Three losses, each with its own weight (kernels/moe/grouping.py has their formulas): `balance` over the micro-batch,
`sequence_balance` within each row, `router_z` on the size of the logits. They are computed in training only. The loss-free
bias (`MoeMixer.balance_experts`) is not a loss and may be used next to them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from amfm.kernels.moe.grouping import balance_loss, count_by_row, count_experts, router_z_loss, sequence_balance_loss
from amfm.kernels.moe.op import Routing
from amfm.kernels.runtime.compiling import disable_compile
from amfm.model.config.moe import MoeConfig
from amfm.model.packing import Padding, means_without
from amfm.model.parallel.groups import ProcessGroupCollection


def auxiliary_losses(
    logits_RE: Tensor,
    routing: Routing,
    num_rows: int,
    moe: MoeConfig,
    groups: ProcessGroupCollection,
    padding: Padding | None = None,
) -> dict[str, Tensor]:
    """Compute the losses of `MoeConfig.auxiliary_names`, weighted, which balance the router and keep its logits small.

    The tokens given are those of all tensor ranks and of this context rank. Each value is this context rank's share: over
    `groups.cp`, whose ranks must all call, they add up to the means over the micro-batch, and so do their gradients.
    That is exact, because counts carry no gradient: with those of all tokens known, the rest is a sum over tokens. Padding
    has no part in counts and means.
    """
    mean, row_mean = (None, None) if padding is None else means_without(padding, groups.cp.size())
    losses: dict[str, Tensor] = {}
    ids_RK, own_counts_E = routing.expert_ids_RK, routing.counts_E
    if moe.balance_counts == "scores" and not moe.routes_by_scores():
        # What only the scores would choose: a bias must not hide from the losses what it balances.
        ids_RK = routing.scores_RE.detach().topk(moe.top_k, dim=-1).indices
        if padding is not None:
            ids_RK = ids_RK.masked_fill(padding.is_padding_BT.reshape(-1, 1), moe.num_experts)
        own_counts_E = count_experts(ids_RK, moe.num_experts + 1)[: moe.num_experts]
    if moe.auxiliary_loss_weight:
        counts_E = sum_over_context(own_counts_E, groups)
        losses["balance"] = moe.auxiliary_loss_weight * balance_loss(routing.scores_RE, counts_E, moe.top_k, mean)
    if moe.sequence_loss_weight:
        ids_BTK, scores_BTE = (values.unflatten(0, (num_rows, -1)) for values in (ids_RK, routing.scores_RE))
        # One expert more, which padding has chosen.
        counts_BE = sum_over_context(count_by_row(ids_BTK, moe.num_experts + 1)[:, : moe.num_experts], groups)
        losses["sequence_balance"] = moe.sequence_loss_weight * sequence_balance_loss(scores_BTE, counts_BE, row_mean)
    if moe.z_loss_weight:
        losses["router_z"] = moe.z_loss_weight * router_z_loss(logits_RE, mean)
    losses |= {name: values_R.mean() if mean is None else mean(values_R) for name, values_R in routing.losses.items()}
    return {name: loss / groups.cp.size() for name, loss in losses.items()}


def sum_over_context(counts: Tensor, groups: ProcessGroupCollection) -> Tensor:
    """Sum counts over all context ranks, which must all call."""
    return counts if groups.cp.size() == 1 else _sum(counts, groups)


@disable_compile
def _sum(counts: Tensor, groups: ProcessGroupCollection) -> Tensor:
    """All-reduce a copy: the counts of this rank are reported too."""
    total = counts.clone()
    torch.distributed.all_reduce(total, group=groups.cp)
    return total


@torch.no_grad()
def add_entropies(sums_2: Tensor, scores_RE: Tensor, padding: Padding | None) -> None:
    """Add to sums [2] the entropies in nats of tokens' scores, made to add up to 1, and how many tokens that are."""
    shares_RE = scores_RE / scores_RE.sum(-1, keepdim=True).clamp(min=torch.finfo(scores_RE.dtype).tiny)
    entropies_R, number = torch.special.entr(shares_RE).sum(-1), torch.full_like(sums_2[1], len(scores_RE))
    if padding is not None:
        is_padding_R = padding.is_padding_BT.flatten()
        entropies_R, number = entropies_R.masked_fill(is_padding_R, 0.0), (~is_padding_R).sum()
    sums_2 += torch.stack([entropies_R.sum(), number.to(entropies_R.dtype)]).to(sums_2.dtype)
