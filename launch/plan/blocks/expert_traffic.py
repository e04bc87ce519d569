"""What spread experts exchange: rows of tokens, what is known of their choices, and how many rows come."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

from amfm.kernels.moe.capacity import expert_capacity
from amfm.launch.plan.exchange import FLOAT32, INT64, Exchange, element_type
from amfm.launch.plan.layout import Layout
from amfm.model.config.moe import MoeConfig
from amfm.model.moe.capacity import slots_for
from amfm.pretrain.config.schema import RunConfig


class ExpertTraffic(NamedTuple):
    """What E blocks send over one axis: rows, and with them what is known of each row's choices; before them their numbers."""

    rows: Exchange
    details: Exchange | None
    counts: Exchange


def expert_traffic(config: RunConfig, layout: Layout, blocks: int) -> ExpertTraffic | None:
    """What so many E blocks send over the expert axis; None where experts are not spread.

    A token's row travels once to each rank that holds experts of its choice, and home again, forward and backward. Beside
    it go, out in forward and home in backward, the weights of its choices and their ids in float32. How many rows those
    are depends on the router; counted is what is expected of an even one. Under a capacity factor that makes slots, those
    travel, a row each, filled or not. Where halves of a micro-batch overlap, each travels by itself.
    """
    moe = config.model.moe
    if layout.expert == 1 or moe is None or not blocks:
        return None
    dtype, size = element_type(config)
    ranks, calls = layout.stage_ranks, blocks * layout.expert_parts
    slots = static_slots(config, layout)
    if slots is None:
        rows = ranks // layout.tensor * layout.tokens(config) * expected_ranks(moe, layout.expert)
        details = Exchange("ep", "all_to_all", "float32", 2 * calls, 2 * blocks * rows * 2 * moe.top_k * FLOAT32)
        numbers = layout.expert * 2 * layout.expert_parts
    else:
        rows, details, numbers = ranks * slots * moe.num_experts, None, moe.num_experts
    moved = 4 * blocks * rows * (moe.latent_size or config.model.hidden_size) * size
    return ExpertTraffic(
        Exchange("ep", "all_to_all", dtype, 4 * calls, moved),
        details,
        Exchange("ep", "all_to_all", "int64", blocks, blocks * ranks * numbers * INT64),
    )


@lru_cache(maxsize=256)
def expected_ranks(moe: MoeConfig, expert_ranks: int) -> float:
    """Ranks on which the experts of a token's choices lie, as expected of an even router: rows that a token sends.

    K different experts out of E leave out the e of one rank with probability C(E - e, K) / C(E, K), since so many of all
    sets have none of them; P ranks are each reached with the rest of it. A router that draws from g of n groups of experts
    first opens, of the groups on a rank, j with the probability of j among g draws out of n (hypergeometric); then K are
    drawn from all experts of open groups, of which those on the rank are j groups' (of a group that is larger than a rank,
    the rank's).
    """
    groups, best = moe.num_router_groups, moe.router_group_top_k
    group_size = moe.num_experts // groups
    held, inside = max(1, groups // expert_ranks), min(group_size, moe.num_experts // expert_ranks)
    open_experts = best * group_size
    reached = 0.0
    for number in range(1, min(held, best) + 1):
        opened = math.comb(held, number) * math.comb(groups - held, best - number) / math.comb(groups, best)
        left_out = math.comb(open_experts - number * inside, moe.top_k) / math.comb(open_experts, moe.top_k)
        reached += opened * (1 - left_out)
    return expert_ranks * reached


def has_certain_ranks(moe: MoeConfig, expert_ranks: int) -> bool:
    """Whether a token's choices lie on equally many ranks whatever a router chooses.

    So they do with one choice, with one expert a rank, and with so many choices that no rank is left out.
    """
    held = moe.num_experts // expert_ranks
    return moe.top_k == 1 or held == 1 or moe.top_k > moe.num_experts - held


def static_slots(config: RunConfig, layout: Layout) -> int | None:
    """Slots of each rank for each expert under a capacity factor (model/moe/capacity.py); None where rows are counted.

    An even number where they are cut in halves.
    """
    moe = config.model.moe
    if moe is None or moe.capacity_factor is None or layout.expert == 1:
        return None
    whole = layout.tokens(config) * layout.context
    capacity = expert_capacity(whole, moe.top_k, moe.num_experts, moe.capacity_factor)
    slots = slots_for(layout.tokens(config) // layout.tensor, moe.top_k, moe.num_experts, capacity)
    return None if slots is None else -(-slots // layout.expert_parts) * layout.expert_parts
