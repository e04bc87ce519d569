"""Rows that are sent to experts, against every choice that a small router can make."""

from itertools import combinations

import pytest
from amfm_simulate.step_traffic import has_certain_ranks

from amfm.model.config.moe import MoeConfig
from amfm.model.moe.transfer import expected_ranks


def moe_of(experts, top_k, groups=1, best=1):
    return MoeConfig(
        num_experts=experts,
        top_k=top_k,
        expert_hidden_size=8,
        activation="swiglu",
        num_router_groups=groups,
        router_group_top_k=best,
    )


@pytest.mark.parametrize(
    ("experts", "top_k", "ranks", "groups", "best"),
    [
        (8, 2, 4, 1, 1),
        (8, 3, 2, 1, 1),
        (8, 1, 4, 1, 1),
        (8, 4, 8, 1, 1),
        (8, 7, 4, 1, 1),
        (8, 2, 4, 2, 1),
        (8, 3, 2, 4, 2),
        (8, 3, 4, 4, 3),
    ],
)
def test_ranks_of_a_token_are_the_mean_over_all_choices(experts, top_k, ranks, groups, best):
    moe, size = moe_of(experts, top_k, groups, best), experts // groups
    found = []
    for chosen in combinations(range(groups), best):
        allowed = [expert for expert in range(experts) if expert // size in chosen]
        found += [len({expert * ranks // experts for expert in ids}) for ids in combinations(allowed, top_k)]
    assert expected_ranks(moe, ranks) == pytest.approx(sum(found) / len(found))
    assert has_certain_ranks(moe, ranks) <= (len(set(found)) == 1)
    if groups == 1:
        assert has_certain_ranks(moe, ranks) == (len(set(found)) == 1)
