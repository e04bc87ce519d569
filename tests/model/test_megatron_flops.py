"""Megatron-LM's formula for FLOPs, and balance losses in its scale."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

import amfm
from amfm.model.config.schema import ModelConfig
from amfm.model.flops import flops_per_token, mean_auxiliary, megatron_flops_per_token

CONFIGS = Path(amfm.__file__).parent / "configs"


def model_of(preset: str) -> ModelConfig:
    return ModelConfig.model_validate(yaml.safe_load((CONFIGS / f"{preset}.yaml").read_text(encoding="utf-8"))["model"])


# Measured with Megatron-LM's own function (d98e8a6), over ours.
@pytest.mark.parametrize(
    ("preset", "ratio"),
    [
        ("nemotron3_nano_30b", 1.073),
        ("nemotron3_super_120b", 0.992),
        ("granite4_h_small", 1.003),
        ("ladder_8b_a1b", 1.002),
    ],
)
def test_megatron_counts_what_its_own_function_counted(preset: str, ratio: float) -> None:
    model = model_of(preset)
    theirs = megatron_flops_per_token(model, 8192)
    assert theirs is not None
    assert theirs / sum(flops_per_token(model, 8192).values()) == pytest.approx(ratio, abs=0.002)


def test_a_transformer_by_hand() -> None:
    attention = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16}
    tree = {"vocab_size": 100, "hidden_size": 64, "pattern": "*-", "attention": attention}
    model = ModelConfig.model_validate(tree | {"feed_forward": {"hidden_size": 256, "activation": "squared_relu"}})
    projections = 2 * (64 * 64 + 2 * 64 * 32 + 64 * 64)
    keys = 4 * 64 * (128 // 2)  # scores and sums over half of a row
    expected = 3 * (projections + keys + 2 * 2 * 64 * 256 + 2 * 64 * 100)
    assert megatron_flops_per_token(model, 128) == expected


def test_blocks_without_a_formula_have_no_number() -> None:
    tree = {"vocab_size": 100, "hidden_size": 64, "pattern": "G", "mixers": {"gated_deltanet": {"num_heads": 2}}}
    assert megatron_flops_per_token(ModelConfig.model_validate(tree), 128) is None


def test_balance_losses_are_means_over_blocks_without_weights() -> None:
    moe = {"num_experts": 4, "top_k": 2, "expert_hidden_size": 8, "auxiliary_loss_weight": 1e-4, "z_loss_weight": 0.01}
    model = ModelConfig.model_validate({"vocab_size": 8, "hidden_size": 8, "pattern": "EEEE", "moe": moe})
    given = {"balance": 4.010e-4, "router_z": 0.08, "sequence_balance": 0.0}
    assert mean_auxiliary(model, given, 4) == pytest.approx({"balance": 1.0025, "router_z": 2.0})
    assert mean_auxiliary(model, given, 0) == {}
