"""First values: their distributions, and that they depend on the seed and the name alone."""

import math

import pytest
import torch

from model.config.schema import AttentionConfig, FeedForwardConfig, Mamba2Config, ModelConfig, MoeConfig
from model.hybrid import HybridModel
from model.parallel.groups import single_rank_groups

WIDE = ModelConfig(
    pattern="M*E-",
    vocab_size=500,
    hidden_size=64,
    mamba=Mamba2Config(num_heads=256, head_dim=2, state_size=4, num_groups=2),
    attention=AttentionConfig(num_heads=8, num_kv_heads=2, head_dim=16, qk_norm=True),
    moe=MoeConfig(num_experts=4, top_k=2, expert_hidden_size=32, shared_expert_hidden_size=64, expert_bias=True),
    feed_forward=FeedForwardConfig(hidden_size=128),
)


def values(config, seed=0):
    return dict(HybridModel(config, single_rank_groups(), seed=seed).named_parameters())


def test_matrices_have_the_configured_deviation_and_output_projections_a_smaller_one():
    outputs = ("out_proj.weight", "o_proj.weight", "down_proj.weight", "experts.down")
    for name, value in values(WIDE).items():
        if value.dim() < 2 or "conv" in name:
            continue
        expected = 0.02 / math.sqrt(4) if name.endswith(outputs) else 0.02
        assert value.std().item() == pytest.approx(expected, rel=0.1), name
        assert abs(value.mean().item()) < 4 * expected / math.sqrt(value.numel()), name


def test_without_depth_scaling_all_matrices_have_one_deviation():
    parameters = values(WIDE.model_copy(update={"depth_scaled_init": False}))
    assert parameters["blocks.1.mixer.o_proj.weight"].std().item() == pytest.approx(0.02, rel=0.1)


def test_a_latent_expert_scales_only_its_last_matrix():
    moe = WIDE.moe.model_copy(update={"latent_size": 48})
    parameters = values(WIDE.model_copy(update={"moe": moe}))
    assert parameters["blocks.2.mixer.experts.down"].std().item() == pytest.approx(0.02, rel=0.1)
    assert parameters["blocks.2.mixer.latent_up.weight"].std().item() == pytest.approx(0.01, rel=0.1)


def test_decay_and_time_step_start_in_their_ranges():
    parameters = values(WIDE)
    decay_H = parameters["blocks.0.mixer.A_log"].exp()
    assert 1 <= decay_H.min() < 2 and 15 < decay_H.max() <= 16
    assert decay_H.mean().item() == pytest.approx(8.5, rel=0.1)
    step_H = torch.nn.functional.softplus(parameters["blocks.0.mixer.dt_bias"])
    assert 1e-3 * 0.999 <= step_H.min() < 2e-3 and 5e-2 < step_H.max() <= 0.1 * 1.001
    assert step_H.log10().mean().item() == pytest.approx(-2.0, abs=0.15)


def test_norms_and_skips_start_at_one_and_biases_at_zero():
    parameters = values(WIDE)
    ones = ("norm.weight", ".D")
    assert all((value == 1).all() for name, value in parameters.items() if name.endswith(ones))
    assert (parameters["blocks.0.mixer.conv.bias"] == 0).all()


def test_first_values_depend_on_seed_and_name_alone():
    here, again, other = values(WIDE), values(WIDE), values(WIDE, seed=1)
    longer = values(WIDE.model_copy(update={"pattern": "M*E-MM", "depth_scaled_init": False}))
    flat = values(WIDE.model_copy(update={"depth_scaled_init": False}))
    for name, value in here.items():
        assert torch.equal(value, again[name]), name
        assert torch.equal(flat[name], longer[name]), name
        if not name.endswith(("norm.weight", ".D", "conv.bias")):
            assert not torch.equal(value, other[name]), name
    assert not torch.equal(here["blocks.1.mixer.k_proj.weight"], here["blocks.1.mixer.v_proj.weight"])
    experts = here["blocks.2.mixer.experts.up"]
    assert not torch.equal(experts[0], experts[1])
