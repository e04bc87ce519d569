"""Capacity limits: which of a router's choices are carried out where an expert takes only this many of a micro-batch.

An expert takes `capacity_factor` times its even share of the choices; what is over is dropped (Fedus et al. 2021, arXiv
2101.03961, section 2.2) or recycled to an expert with room. Limits hold in training only: a token's prediction must not
depend on the other tokens of its batch. The tokens of whole rows are ranked together on every rank, for which context ranks
gather the chosen ids (small integers, no activations); so the choices are the same on every layout.

What is carried out of a router's choices, and choices without those of padding.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from amfm.kernels.moe.capacity import drop_overflow, expert_capacity, recycle_overflow
from amfm.kernels.moe.grouping import count_experts
from amfm.kernels.moe.op import Routing
from amfm.model.config.moe import MoeConfig
from amfm.model.packing import PackMeta, Padding
from amfm.model.parallel.context import gather_rows
from amfm.model.parallel.groups import ProcessGroupCollection

LARGEST_PADDING = 2.0  # rows sent over rows chosen, up to which slots of one size cost less than to wait for counts


@dataclass(frozen=True)
class Choices:
    """Choices that are carried out: expert ids [R, K], `num_experts` for a dropped one, and weights [R, K], 0 for it.

    capacity: choices that an expert takes of the whole rows at most, with those that padding might have had; None without a limit.
    bound: where nothing is sent, choices that are not dropped, at most; None: none is.
    """

    expert_ids_RK: Tensor
    weights_RK: Tensor
    capacity: int | None = None
    bound: int | None = None

    def slots(self, num_tokens: int, num_experts: int) -> int | None:
        """Slots for each expert that hold what this many of the tokens choose; None without a limit, or as `slots_for` says."""
        if self.capacity is None:
            return None
        return slots_for(num_tokens, self.expert_ids_RK.shape[1], num_experts, self.capacity)


def slots_for(num_tokens: int, top_k: int, num_experts: int, capacity: int) -> int | None:
    """Slots for each expert that hold the choices of this many tokens; None if too many would stay empty.

    A token chooses an expert once, and the capacity holds for the tokens of all ranks that share the rows, so each of
    several ranks needs as many slots as all together.
    """
    slots = min(num_tokens, capacity)
    return slots if 0 < slots * num_experts <= LARGEST_PADDING * num_tokens * top_k else None


def leave_out(routing: Routing, padding: Padding, num_experts: int) -> Routing:
    """The same choices without those of padding, which are lost (`Choices`): weight 0, and no part in the counts."""
    is_padding_R1 = padding.is_padding_BT.reshape(-1, 1)
    ids_RK = routing.expert_ids_RK.masked_fill(is_padding_R1, num_experts)
    counts_E = count_experts(ids_RK, num_experts + 1)[:num_experts]
    return replace(
        routing, expert_ids_RK=ids_RK, weights_RK=routing.weights_RK.masked_fill(is_padding_R1, 0.0), counts_E=counts_E
    )


def limit_choices(
    routing: Routing,
    meta: PackMeta,
    moe: MoeConfig,
    groups: ProcessGroupCollection,
    seed: Tensor,
    *,
    backend: str = "torch",
) -> Choices:
    """Drop or recycle the choices beyond `capacity_factor` times an expert's even share of a micro-batch.

    The tokens are those of this context rank, for all tensor ranks alike; decided is over the whole rows of all context
    ranks, by each alike, so a layout changes nothing as long as micro-batches are the same. Experts take tokens by their
    place in the row, then by row. A dropped choice leaves the weights of the others as they were; with recycling the
    weights are those that the router gives to the experts that get the token. Every rank of `groups.cp` must call.
    """
    assert moe.capacity_factor is not None, "there is a capacity to keep to"
    num_rows = meta.document_ids_BT.shape[0]
    ids_BTK = routing.expert_ids_RK.unflatten(0, (num_rows, -1))
    if meta.segments is not None:
        ids_BTK = gather_rows(ids_BTK[None], meta.segments, groups)[0]
    # Time first: at each place in the row all rows take their turn, so no row fills an expert before the others.
    all_RK = ids_RK = ids_BTK.transpose(0, 1).flatten(0, 1)
    valid_R = None
    if meta.padding is not None:
        # Padding comes with lost choices. Only those of tokens, in their order; how many, the host knows.
        valid_R = (all_RK[:, 0] == moe.num_experts).to(torch.int8).argsort(stable=True)[: meta.padding.num_tokens]
        ids_RK = all_RK[valid_R]
    capacity = expert_capacity(len(ids_RK), moe.top_k, moe.num_experts, moe.capacity_factor)
    if moe.overflow == "drop":
        kept_RK = drop_overflow(ids_RK, moe.num_experts, capacity, backend=backend)
    else:
        kept_RK = recycle_overflow(ids_RK, moe.num_experts, capacity, seed, backend=backend)
    if valid_R is not None:
        kept_RK = all_RK.index_copy(0, valid_R, kept_RK.to(all_RK.dtype))
    kept_BTK = kept_RK.unflatten(0, (-1, num_rows)).transpose(0, 1)
    if meta.segments is not None:
        kept_BTK = meta.segments.take(kept_BTK)
    own_RK = kept_BTK.flatten(0, 1)
    # Room is the same on all ranks, whose micro-batches have other tokens, where rows are padded.
    room = expert_capacity(len(all_RK), moe.top_k, moe.num_experts, moe.capacity_factor)
    return Choices(own_RK, _weights(routing, own_RK, moe), room)


def _weights(routing: Routing, ids_RK: Tensor, moe: MoeConfig) -> Tensor:
    """Weights [R, K] of the choices that are carried out; recycled ones are weighed again, as `route` weighs the
    first.
    """
    is_kept_RK = ids_RK < moe.num_experts
    if moe.overflow == "drop":
        return torch.where(is_kept_RK, routing.weights_RK, 0.0)
    scores_RK = routing.scores_RE.gather(1, ids_RK.clamp(max=moe.num_experts - 1))
    scores_RK = torch.where(is_kept_RK, scores_RK, 0.0)
    if moe.normalize_probabilities:
        scores_RK = scores_RK / (scores_RK.sum(-1, keepdim=True) + 1e-20)
    return scores_RK * moe.routed_scaling
