"""What balances the load of experts: auxiliary losses, over all tokens of a micro-batch wherever they are, and quantile balancing.

Three losses, each with its own weight (kernels/moe/grouping.py has their formulas): `balance` over the micro-batch,
`sequence_balance` within each row, `router_z` on the size of the logits. They are computed in training only. The loss-free
bias (`MoeMixer.balance_experts`) is not a loss and may be used next to them.

Quantile balancing: each expert's bias is the one with which its share of a step's tokens would have chosen it.
A token chooses expert e if score + bias of e is above its cutoff, the best score + bias that it does not choose (number k + 1).
So cutoff - score is the bias that e requires for this token, and the quantile k / E of that over all tokens of a step is the
bias that gives e an even share, had the other experts kept theirs. No rate has to be set, and no loss has a part in it.
Quantiles are read from histograms, whose counts of all ranks add up exactly, so that every rank finds the same bias.

Source: Su 2026, MoE Odyssey 6 (kexue.fm/archives/11619); Megatron-Core's quantile_balancing and the report on Kimi K3, whose
appendix D has the histogram, are the same rule.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

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


NUM_BINS = 1000


class RequiredBiases(nn.Module):
    """A histogram for each expert of the biases that the tokens of a step require, for scores between 0 and 1.

    Passes in training add to it, set_step empties it; nothing of it is saved. A pass that a backward pass repeats counts again,
    which quantiles do not see: it repeats all of a micro-batch's tokens.
    """

    def __init__(self, num_experts: int, top_k: int, groups: ProcessGroupCollection) -> None:
        super().__init__()
        self.top_k, self.groups = top_k, groups
        self.counts_EH: Tensor
        self.register_buffer("counts_EH", torch.zeros(num_experts, NUM_BINS, dtype=torch.int32), persistent=False)

    def set_step(self, step: int, total_steps: int, seed: int) -> None:
        """Forget the step before, also one that was skipped."""
        self.counts_EH.zero_()

    @torch.no_grad()
    def count(self, scores_RE: Tensor, bias_E: Tensor, is_living_E: Tensor, padding: Padding | None) -> None:
        """Count the tokens of a pass, those of all tensor ranks; padding has no part."""
        scores_RE = scores_RE.detach()
        cutoff_R1 = (scores_RE + bias_E).topk(self.top_k + 1, dim=-1).values[:, -1:]
        low, width = bounds(bias_E, is_living_E)
        bins_RE = ((cutoff_R1 - scores_RE - low) / width).long().clamp(0, NUM_BINS - 1)
        flat_RE = bins_RE + NUM_BINS * torch.arange(len(bias_E), device=bias_E.device)
        counted_RE = torch.ones_like(flat_RE, dtype=torch.int32)
        if padding is not None:
            counted_RE = counted_RE.masked_fill(padding.is_padding_BT.reshape(-1, 1), 0)
        self.counts_EH.view(-1).scatter_add_(0, flat_RE.flatten(), counted_RE.flatten())

    @torch.no_grad()
    def solve(self, bias_E: Tensor, is_living_E: Tensor) -> Tensor:
        """The biases of living experts, [E], with mean 0; the same on all ranks of `groups.dp_cp`, which must all call.

        bias_E: that of the passes that were counted; it is what a step without tokens leaves.
        """
        counts_EH = self._of_all_ranks().double()
        sums_EH = counts_EH.cumsum(-1)
        target_E1 = sums_EH[:, -1:] * (self.top_k / is_living_E.sum())
        bins_E1 = torch.searchsorted(sums_EH, target_E1).clamp(max=NUM_BINS - 1)
        inside_E1 = counts_EH.gather(1, bins_E1)
        before_E1 = sums_EH.gather(1, bins_E1) - inside_E1
        low, width = bounds(bias_E, is_living_E)
        share_E1 = (target_E1 - before_E1) / inside_E1.clamp(min=1)
        found_E = (low + width * (bins_E1 + share_E1))[:, 0].to(bias_E)
        found_E = torch.where(is_living_E & (sums_EH[:, -1] > 0), found_E, bias_E)
        mean = found_E.masked_fill(~is_living_E, 0).sum() / is_living_E.sum()
        return torch.where(is_living_E, found_E - mean, found_E)

    @disable_compile
    def _of_all_ranks(self) -> Tensor:
        counts_EH = self.counts_EH.clone()
        if self.groups.dp_cp.size() > 1:
            torch.distributed.all_reduce(counts_EH, group=self.groups.dp_cp)
        return counts_EH


def bounds(bias_E: Tensor, is_living_E: Tensor) -> tuple[Tensor, Tensor]:
    """Lower end of the first bin, and a bin's width: whatever scores between 0 and 1 require is inside."""
    low = bias_E.masked_fill(~is_living_E, torch.inf).min() - 1
    high = bias_E.masked_fill(~is_living_E, -torch.inf).max() + 1
    return low, (high - low) / NUM_BINS
