"""Balancing of routers where counts are large, or where a capacity changes who computes a choice."""

from __future__ import annotations

import pytest
import torch

from amfm.model.config.moe import MoeConfig
from tests.model.small_models import meta_of, packed_batch, small_config, small_model

MOE = MoeConfig(num_experts=4, top_k=2, expert_hidden_size=4, expert_bias=True, bias_update_rate=0.01)


@pytest.mark.parametrize("even", [40_960, 2**24])
def test_counts_of_any_size_move_the_bias_by_the_sign_of_their_exact_difference(even: int) -> None:
    """bf16 has steps of 256 at 40,960; float32 steps of 2 above 2^24."""
    model = small_model(small_config("E", moe=MOE))
    bias_E = model.blocks[0].mixer.expert_bias.zero_()
    model.update_expert_bias({0: torch.tensor([even + 1, even - 1, even + 3, even - 3])})
    assert bias_E.tolist() == pytest.approx([-0.01, 0.01, -0.01, 0.01])


def test_a_capacity_changes_neither_the_balance_losses_nor_the_counts() -> None:
    tokens_BT, labels_BT, ids_BT = packed_batch()
    found = []
    for factor in (0.5, None):
        moe = MOE.model_copy(
            update={"capacity_factor": factor, "auxiliary_loss_weight": 1.0, "sequence_loss_weight": 1.0}
        )
        output = small_model(small_config("E", moe=moe), seed=3).train()(tokens_BT, meta_of(ids_BT), labels_BT)
        found.append((output.auxiliary, output.expert_counts[0], output.loss.nll_sum))
    (limited, counts, nll), (free, free_counts, free_nll) = found
    assert all(torch.equal(limited[name], free[name]) for name in ("balance", "sequence_balance"))
    assert torch.equal(counts, free_counts) and not torch.equal(nll, free_nll)
