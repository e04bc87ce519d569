"""Updates that a router chooses among: the sum over the chosen, token by token, alike on every layout of ranks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from amfm.model.config.schema import LoraMixerConfig
from amfm.model.flops import count_parameters
from amfm.model.huggingface.classes import choose_target
from amfm.model.hybrid import HybridModel
from amfm.model.parallel.groups import single_rank_groups
from amfm.model.parallel.layers import ColumnLinear, RowLinear
from amfm.model.parallel.shards import parameter_shards
from amfm.model.routed_updates import RoutedUpdates, sharpness_loss
from amfm.model.shapes import weight_shapes
from amfm.pretrain.config.schema import ParallelConfig
from amfm.pretrain.parallel import initialize_parallel
from tests.helpers.numbers import assert_near
from tests.helpers.patience import PATIENCE_SECONDS
from tests.helpers.spawn import run_ranks
from tests.model.small_models import cut_batch, small_config, small_model
from tests.model.test_lora import DOCUMENTS, EXACT, MIXERS, run_model

ROUTED = LoraMixerConfig(num_experts=4, top_k=2, rank=2, alpha=6.0, balance_weight=0.1)


class Projections(nn.Module):
    """The projections of one block, and nothing between them."""

    def __init__(self) -> None:
        super().__init__()
        groups = single_rank_groups()
        self.q_proj = ColumnLinear(6, (8,), groups, name="heads")
        self.o_proj = RowLinear(8, 6, groups, name="heads")


def filled(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(3)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return module


def routed_reference(x_RD: Tensor, layer: Any, weights_RE: Tensor, rank: int, scale: float) -> Tensor:
    """W x + scale times the sum over experts of p_e B_e A_e x, one token and one expert at a time."""
    rows = []
    for x_D, weights_E in zip(x_RD, weights_RE):
        y = layer.weight @ x_D
        for expert, weight in enumerate(weights_E):
            own = slice(expert * rank, (expert + 1) * rank)
            y = y + scale * weight * (layer.lora.up[:, own] @ (layer.lora.down[own] @ x_D))
        rows.append(y)
    return torch.stack(rows)


@pytest.mark.parametrize("top_k", [1, 2])
def test_outputs_and_gradients_are_those_of_the_sum_over_the_chosen(top_k: int) -> None:
    section = ROUTED.model_copy(update={"top_k": top_k})
    mixer = Projections()
    updates = filled(RoutedUpdates(mixer, section, 6, single_rank_groups(), "torch"))
    filled(mixer)
    x_BTD = torch.randn(2, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    trained = [x_BTD, *mixer.parameters(), *updates.parameters()]

    balance = updates.choose(x_BTD)["lora_balance"]
    found = mixer.o_proj(mixer.q_proj(x_BTD))

    x_RD = x_BTD.flatten(0, 1)
    scores_RE = (x_RD @ updates.router.weight.T).softmax(-1)
    chosen_RE = torch.zeros_like(scores_RE).scatter(1, scores_RE.topk(top_k).indices, 1.0)
    weights_RE = scores_RE * chosen_RE
    if top_k > 1:
        weights_RE = weights_RE / weights_RE.sum(-1, keepdim=True)
    inner_RX = routed_reference(x_RD, mixer.q_proj, weights_RE, 2, 3.0)
    expected = routed_reference(inner_RX, mixer.o_proj, weights_RE, 2, 3.0).view_as(found)
    share_E = chosen_RE.sum(0) / chosen_RE.sum()
    expected_balance = 0.1 * 4 * (share_E * scores_RE.mean(0)).sum()

    assert_near(found, expected, EXACT, "outputs")
    assert_near(balance, expected_balance, EXACT, "balance")
    ours = torch.autograd.grad(found.square().sum() + balance, trained)
    theirs = torch.autograd.grad(expected.square().sum() + expected_balance, trained)
    for actual, wanted in zip(ours, theirs, strict=True):
        assert_near(actual, wanted, EXACT, "gradients")


def test_tokens_are_asked_to_decide_as_far_as_choices_are_balanced() -> None:
    scores = torch.tensor([[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.1, 0.1, 0.8], [1.0, 0.0, 0.0]], dtype=torch.float64)
    scores.requires_grad_()

    def entropy(row: list[float]) -> float:
        return -sum(p * math.log(p) for p in row if p > 0)

    rows = scores.tolist()
    balanced = entropy([sum(column) / 4 for column in zip(*rows)]) / math.log(3)
    found = sharpness_loss(scores)
    assert abs(float(found) - balanced * sum(map(entropy, rows)) / 4) < 1e-12
    (gradient,) = torch.autograd.grad(found, scores)
    expected = -balanced * (scores[:3].detach().log() + 1) / 4
    assert_near(gradient[:3], expected, EXACT, "the balance is a constant")


def test_all_updates_count_until_choices_harden_and_never_outside_of_training() -> None:
    mixer = Projections()
    section = ROUTED.model_copy(update={"hard_from_step": 2})
    updates = filled(RoutedUpdates(mixer, section, 6, single_rank_groups(), "torch"))
    filled(mixer)
    x_BTD = torch.randn(2, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    scores_RE = (x_BTD.flatten(0, 1) @ updates.router.weight.T).softmax(-1)
    soft_RE = routed_reference(x_BTD.flatten(0, 1), mixer.q_proj, scores_RE, 2, 3.0)
    kept_RE = torch.zeros_like(scores_RE).scatter(1, scores_RE.topk(2).indices, 1.0) * scores_RE
    hard_RE = routed_reference(x_BTD.flatten(0, 1), mixer.q_proj, kept_RE / kept_RE.sum(-1, keepdim=True), 2, 3.0)
    for step, trains, expected in ((0, True, soft_RE), (1, True, soft_RE), (2, True, hard_RE), (1, False, hard_RE)):
        updates.train(trains).set_step(step, 4, 0)
        updates.measured = torch.zeros(4)
        updates.choose(x_BTD)
        assert_near(mixer.q_proj(x_BTD).flatten(0, 1), expected, EXACT, f"step {step}")
        assert updates.measured.tolist() == (kept_RE > 0).sum(0).tolist()


def test_updates_start_at_nothing_and_are_counted() -> None:
    config = small_config("*{window_linear}-", mixers=MIXERS)
    routed = config.model_copy(update={"lora_mixer": ROUTED})
    plain, updated = small_model(config).eval(), small_model(routed).eval()
    updated.load_state_dict(plain.state_dict(), strict=False)
    tokens_BT, _, meta = cut_batch(DOCUMENTS, single_rank_groups())
    assert torch.equal(updated(tokens_BT, meta).logits_BTV, plain(tokens_BT, meta).logits_BTV)
    held = {name: tuple(tensor.shape) for name, tensor in updated.state_dict().items()}
    assert held == weight_shapes(routed)
    assert count_parameters(routed).total == sum(parameter.numel() for parameter in updated.parameters())
    with pytest.raises(ValueError, match=r"model\.lora_mixer has low-rank updates that a router chooses among"):
        choose_target(routed)


def test_more_choices_than_updates_are_refused() -> None:
    config = small_config("*", lora_mixer=ROUTED.model_copy(update={"top_k": 5}))
    with pytest.raises(ValueError, match=r"model\.lora_mixer\.top_k=5 is more than num_experts=4"):
        small_model(config)


def with_routed(groups: Any = None) -> HybridModel:
    """Attention and window_linear with updates that do something; everything is trained."""
    config = small_config("*{window_linear}", mixers=MIXERS, lora_mixer=ROUTED)
    model = HybridModel(config, groups or single_rank_groups(), seed=1).double()
    for name, parameter, shard in parameter_shards(model):
        if name.endswith("lora.up"):
            shape = torch.Size(shard.whole_shape(parameter.shape))
            whole = torch.linspace(-1, 1, shape.numel(), dtype=torch.float64).view(shape)
            parameter.data.copy_(shard.shard(whole, model.groups))
    return model


def run_spread(sections: list[ParallelConfig]) -> list[dict[str, Tensor]]:
    found = []
    for section in sections:
        groups = initialize_parallel(section, timeout_seconds=PATIENCE_SECONDS, num_threads=1).groups
        found.append(run_model(with_routed(groups)))
    return found


@pytest.mark.slow  # the layers' cuts are those of one update, whose tests run tensor ranks
def test_tensor_ranks_choose_and_compute_what_one_does() -> None:
    sections = [ParallelConfig(tensor=2), ParallelConfig(tensor=2, sequence_parallel=True)]
    expected = run_model(with_routed())
    for results in run_ranks(run_spread, sections):
        for actual in results:
            for name, value in expected.items():
                assert_near(actual[name], value, EXACT, name)
