"""A simulated router's choices: as many tokens for every rank, spread over ranks as random draws, within its groups."""

import pytest
import torch
from amfm_simulate.values import spread_choices

from amfm.model.moe.transfer import expected_ranks
from tests.launch.plan.blocks.test_expert_traffic import moe_of


@pytest.mark.parametrize(
    ("tokens", "top_k", "experts", "ranks", "groups", "best"),
    [(4096, 6, 128, 8, 1, 1), (1024, 22, 512, 32, 1, 1), (256, 2, 16, 16, 1, 1), (2048, 8, 256, 32, 8, 4)],
)
def test_every_rank_gets_as_many_tokens_and_a_token_reaches_as_many_ranks_as_random_draws(
    tokens, top_k, experts, ranks, groups, best
):
    ids = spread_choices(tokens, top_k, experts, ranks, groups, best)
    in_order = ids.sort(1).values
    assert ids.shape == (tokens, top_k) and (in_order[:, 1:] > in_order[:, :-1]).all()
    reached = torch.zeros(tokens, ranks, dtype=torch.int64).scatter_(1, ids * ranks // experts, 1)
    assert reached.sum(0).unique().numel() == 1
    moe = moe_of(experts, top_k, groups, best)
    assert reached.sum(1).double().mean().item() == pytest.approx(expected_ranks(moe, ranks), rel=6e-3)
    used = torch.zeros(tokens, groups, dtype=torch.int64).scatter_(1, ids * groups // experts, 1).sum(1)
    assert used.max() <= best
