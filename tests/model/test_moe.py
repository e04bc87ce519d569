"""Balancing: the bias moves by the sign rule, shifts the choice alone, and evens out a skewed load."""

import torch

from model.config import MoeConfig
from tests.model.small_models import meta_of, small_config, small_model

SKEWED = MoeConfig(num_experts=4, top_k=1, expert_hidden_size=4, expert_bias=True, bias_update_rate=0.01)


def test_bias_falls_for_the_busy_and_rises_for_the_idle():
    model = small_model(small_config("-E", moe=SKEWED))
    before = model.blocks[1].mixer.expert_bias.clone()
    model.update_expert_bias({1: torch.tensor([7, 1, 4, 4])})
    moved = model.blocks[1].mixer.expert_bias - before
    torch.testing.assert_close(moved, torch.tensor([-0.01, 0.01, 0.0, 0.0]))


def test_without_a_bias_counts_change_nothing():
    config = small_config("E", moe=SKEWED.model_copy(update={"expert_bias": False}))
    model = small_model(config)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.update_expert_bias({0: torch.tensor([7, 1, 4, 4])})
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_updates_even_out_a_skewed_load():
    config = small_config("E", moe=SKEWED)
    model = small_model(config)
    tokens_BT = torch.arange(40).repeat(4)[None]
    mixer = model.blocks[0].mixer
    mixer.expert_bias.copy_(torch.tensor([0.8, 0.0, 0.0, -0.5]))

    def load():
        return model(tokens_BT, meta_of(torch.zeros_like(tokens_BT))).expert_counts[0]

    assert load().max() > 120
    for _ in range(120):
        model.update_expert_bias({0: load()})
    assert load().max() <= 2 * load().float().mean() and load().min() > 0


def test_bias_changes_who_is_chosen_but_not_the_weight_of_a_choice():
    config = small_config("E", moe=SKEWED.model_copy(update={"normalize_probabilities": False}))
    model = small_model(config)
    tokens_BT = torch.arange(10)[None]
    meta = meta_of(torch.zeros_like(tokens_BT))
    mixer = model.blocks[0].mixer
    mixer.expert_bias.copy_(torch.tensor([9.0, 0.0, 0.0, 0.0]))
    output = model(tokens_BT, meta)
    assert output.expert_counts[0].tolist() == [10, 0, 0, 0]
    mixer.expert_bias[0] = 19.0
    assert torch.equal(model(tokens_BT, meta).logits_BTV, output.logits_BTV)
