"""The choices that a simulated router makes: even over the ranks that hold experts, and spread as a real router's are.

How it works: each block of as many tokens as there are expert ranks draws K different experts, and each of its tokens has
them moved on by as many ranks as its place says, around the end. So every rank gets equally many tokens, no token has an
expert twice, and how many ranks a token's choices are on, which is how many rows are sent, is that of random draws. A step
has few blocks where ranks are many: then more sets are drawn, sorted by the ranks that they reach, and every k-th is
taken, so that the mean is that of many; and they are put in an order in which the mean of every stretch is near that, since
tensor ranks and halves take stretches. Seeds are fixed: a trace gives the same numbers again.
"""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import count

import torch
from torch import Tensor

GOLDEN = (math.sqrt(5) - 1) / 2  # Knuth, The Art of Computer Programming 3, section 6.4, theorem S
LEAST_DRAWS = 2048  # then the mean number of ranks is within some tenths of a percent


@lru_cache(maxsize=4)
def spread_choices(
    tokens: int, top_k: int, num_experts: int, expert_ranks: int = 1, num_groups: int = 1, group_top_k: int = 1
) -> Tensor:
    """Expert ids [tokens, K] int64; with router groups of experts those of a token are in `group_top_k` of them."""
    group_size, held = num_experts // num_groups, num_experts // expert_ranks
    blocks = -(-tokens // expert_ranks)
    every = -(-LEAST_DRAWS // blocks)
    seed = torch.Generator().manual_seed(0)
    group_NG = torch.rand(every * blocks, num_groups, generator=seed).argsort(1)[:, :group_top_k]
    place_NK = torch.rand(every * blocks, group_top_k * group_size, generator=seed).topk(top_k).indices
    expert_NK = group_NG.gather(1, place_NK // group_size) * group_size + place_NK % group_size
    rank_NK = (expert_NK // held).sort(1).values
    reached_N = (rank_NK[:, 1:] != rank_NK[:, :-1]).sum(1)
    taken_N = reached_N.argsort(stable=True)[every // 2 :: every]
    # In an order in which every stretch has few and many: steps of the golden part of a circle leave no gaps.
    step = next(step for step in count(round(GOLDEN * blocks)) if math.gcd(step, blocks) == 1)
    expert_NK = expert_NK[taken_N[(blocks // 2 + torch.arange(blocks) * step) % blocks]]
    # By whole ranks, and where those are smaller than a router's group first inside it, then from group to group.
    moved_P = torch.arange(expert_ranks) * held
    inside_NPK = (expert_NK[:, None] + moved_P[:, None]) % group_size
    group_NPK = (expert_NK[:, None] // group_size + moved_P[:, None] // group_size) % num_groups
    return (group_NPK * group_size + inside_NPK).flatten(0, 1)[:tokens]
