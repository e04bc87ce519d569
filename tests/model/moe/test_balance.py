"""Quantile balancing: a bias is the quantile of what tokens require, and one update makes loads even."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from amfm.model.config.moe import MoeConfig
from amfm.model.moe.balance import NUM_BINS, RequiredBiases
from amfm.model.moe.block import PRUNED_BIAS
from amfm.model.packing import PackMeta, Padding
from amfm.model.parallel.groups import single_rank_groups
from amfm.pretrain.config.schema import ParallelConfig
from amfm.pretrain.parallel import initialize_parallel
from tests.helpers.patience import PATIENCE_SECONDS
from tests.helpers.spawn import run_ranks
from tests.model.small_models import small_config, small_model

E, K, R = 7, 2, 4001
LIVING = torch.ones(E, dtype=torch.bool)


def drawn_scores() -> Tensor:
    """Scores that differ by expert, so that some would get most of the tokens."""
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(R, E, generator=generator) + torch.linspace(-2, 2, E)).sigmoid()


def load(scores_RE: Tensor, bias_E: Tensor) -> float:
    """Tokens of the busiest expert over the mean."""
    counts_E = torch.bincount((scores_RE + bias_E).topk(K).indices.flatten(), minlength=E)
    return float(counts_E.max() / counts_E.float().mean())


def required_of(scores_RE: Tensor, bias_E: Tensor) -> Tensor:
    """What each token requires of each expert: (k + 1)-th best score + bias, minus the score."""
    return (scores_RE + bias_E).sort(descending=True).values[:, K, None] - scores_RE


def test_a_bias_is_the_quantile_of_what_tokens_require_and_loads_become_even() -> None:
    scores_RE, bias_E = drawn_scores(), torch.linspace(-0.1, 0.1, E)
    required = RequiredBiases(E, K, single_rank_groups())
    for part_RE in scores_RE.split(1000):  # micro-batches
        required.count(part_RE, bias_E, LIVING, None)
    found_E = required.solve(bias_E, LIVING)
    expected_E = required_of(scores_RE.double(), bias_E.double()).quantile(K / E, dim=0)
    expected_E -= expected_E.mean()
    assert float((found_E - expected_E).abs().max()) < 2.2 / NUM_BINS, "a bin is 2.2 / 1000 wide"
    assert load(scores_RE, bias_E) > 2.0
    for _ in range(4):
        required.set_step(0, 1, 0)
        required.count(scores_RE, found_E, LIVING, None)
        found_E = required.solve(found_E, LIVING)
    assert load(scores_RE, found_E) < 1.05 and abs(float(found_E.mean())) < 1e-6


def test_padding_and_pruned_experts_have_no_part() -> None:
    scores_RE, bias_E = drawn_scores()[:32], torch.zeros(E)
    padded, alone = (RequiredBiases(E, K, single_rank_groups()) for _ in range(2))
    padded.count(scores_RE, bias_E, LIVING, Padding.of_lengths(torch.tensor([9, 16]), 16))
    alone.count(torch.cat([scores_RE[:9], scores_RE[16:]]), bias_E, LIVING, None)
    assert torch.equal(padded.counts_EH, alone.counts_EH) and int(padded.counts_EH.sum()) == 25 * E
    pruned_E = bias_E.index_fill(0, torch.tensor([1]), PRUNED_BIAS)
    padded.set_step(1, 2, 0)
    padded.count(drawn_scores(), pruned_E, pruned_E == 0, None)
    found_E = padded.solve(pruned_E, pruned_E == 0)
    assert float(found_E[1]) == PRUNED_BIAS and abs(float(found_E[pruned_E == 0].mean())) < 1e-6
    assert load(drawn_scores(), found_E) < 1.5 * E / (E - 1) < load(drawn_scores(), pruned_E)
    empty = RequiredBiases(E, K, single_rank_groups())
    assert torch.equal(empty.solve(bias_E, LIVING), bias_E), "a step without tokens leaves it"


def solve_share() -> Tensor:
    """The bias of one of two data ranks, each with half of the tokens."""
    parallel = initialize_parallel(ParallelConfig(zero_stage=1), timeout_seconds=PATIENCE_SECONDS, num_threads=1)
    required, groups = RequiredBiases(E, K, parallel.groups), parallel.groups
    required.count(drawn_scores()[groups.dp_cp.rank() :: 2], torch.zeros(E), LIVING, None)
    return required.solve(torch.zeros(E), LIVING)


def test_data_ranks_find_the_bias_of_one_rank_bit_for_bit() -> None:
    alone = RequiredBiases(E, K, single_rank_groups())
    alone.count(drawn_scores(), torch.zeros(E), LIVING, None)
    expected_E = alone.solve(torch.zeros(E), LIVING)
    for found_E in run_ranks(solve_share, num_ranks=2):
        assert torch.equal(found_E, expected_E)


def test_a_model_balances_by_it_in_training_and_a_rate_of_zero_holds_the_bias() -> None:
    options = {"num_experts": 6, "top_k": 2, "expert_hidden_size": 8, "expert_bias": True, "bias_rule": "quantile"}
    tokens_BT = torch.randint(0, 40, (4, 64), generator=torch.Generator().manual_seed(0))
    meta = PackMeta.one_document_a_row(4, 64)
    for rate in (1e-3, 0.0):
        model = small_model(small_config("E", moe=MoeConfig(**options, bias_update_rate=rate)))
        model.eval()(tokens_BT, meta)
        mixer = model.blocks[0].mixer
        assert int(mixer.required.counts_EH.sum()) == 0, "evaluation counts nothing"
        before_E = mixer.expert_bias.clone()
        loads = []
        for _ in range(3):
            mixer.required.set_step(0, 1, 0)
            counts = model.train()(tokens_BT, meta).expert_counts
            loads.append(float(counts[0].max() / counts[0].double().mean()))
            model.update_expert_bias(counts)
        assert torch.equal(mixer.expert_bias, before_E) == (rate == 0.0)
        assert rate == 0.0 or loads[2] < 1.2 < loads[0]
        assert "blocks.0.mixer.required.counts_EH" not in model.state_dict(), "nothing of it is saved"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"expert_bias": False}, "set expert_bias: true and router: sigmoid"),
        ({"router": "sqrt_softplus"}, "set expert_bias: true and router: sigmoid"),
        ({"num_router_groups": 2, "router_group_top_k": 1}, "does not know limits of groups"),
        ({"num_experts": 2}, "needs an expert that is not chosen"),
    ],
)
def test_what_it_does_not_go_with_is_refused(changes: dict, message: str) -> None:
    options = {"num_experts": 4, "top_k": 2, "expert_hidden_size": 8, "expert_bias": True, "bias_rule": "quantile"}
    rules = [rule for _, rule in MoeConfig(**options | changes).broken_rules()]
    assert len(rules) == 1 and message in rules[0]
