"""How many ranks the experts of a token's choices lie on, where experts are spread and the router is even."""

from __future__ import annotations

import math
from functools import lru_cache

from amfm.model.config.moe import MoeConfig


@lru_cache(maxsize=256)
def expected_ranks(moe: MoeConfig, expert_ranks: int) -> float:
    """Ranks on which the experts of a token's choices lie, as expected of an even router: rows that a token sends.

    K different experts out of E leave out the e of one rank with probability C(E - e, K) / C(E, K), since this many of all
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
