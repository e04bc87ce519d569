"""Recipes of low precision that cannot take effect, or that no one has shown to be right, are rejected with a fix."""

from __future__ import annotations

import pytest
import torch

from amfm.pretrain.checks.check_run import check_run
from amfm.pretrain.checks.load import load_checked
from amfm.pretrain.checks.low_precision import check_device, warn_of_recipe
from amfm.pretrain.config.errors import ConfigError
from amfm.pretrain.config.file import load_config

MOE = "model.moe={num_experts: 4, top_k: 2, expert_hidden_size: 64, shared_expert_hidden_size: 64}"
MAMBA = "model.mamba={num_heads: 16, head_dim: 16, state_size: 16, num_groups: 1}"
NARROW = [
    "model.pattern=ME*ME",
    "model.hidden_size=64",
    "model.attention={num_heads: 4, num_kv_heads: 2, head_dim: 16}",
    MAMBA,
    MOE,
    "train.precision=bf16",
    "low_precision.recipe=fp8_block",
]


def test_a_recipe_that_suits_its_run_is_taken(base):
    check_run(load_config(base, NARROW))
    check_run(load_config(base, [*NARROW, "low_precision.block_types=E", "low_precision.bf16_last_layers=1"]))
    check_run(load_config(base, [*NARROW, "low_precision.emulate=true", "train.precision=float32"]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            ["low_precision.recipe=none", "low_precision.bf16_last_layers=0.15"],
            "has no effect with low_precision.recipe=none; set a recipe",
        ),
        (["train.precision=float32"], "low_precision.recipe = fp8_block: narrows products of bf16"),
        (["low_precision.block_types=EK"], "names K, and model.pattern has no such block; use some of * E M"),
        (["low_precision.block_types=X"], "'X' is not a letter of a block"),
        (["model.pattern=AA"], "low_precision.block_types = ME-: names no block of model.pattern; use some of *"),
        (
            ["low_precision.bf16_last_layers=1.5"],
            "must be a whole number of blocks, or a part of all below 1; use 1, or 0.30",
        ),
        (["low_precision.bf16_first_layers=5"], "low_precision.recipe = fp8_block: leaves no narrow block"),
        (
            ["low_precision.block_types=E", "low_precision.out_proj_recipe=bf16"],
            "low_precision.block_types names none; remove",
        ),
        (
            ["low_precision.block_types=M", "low_precision.activation_storage=fp8"],
            "low_precision.activation_storage = fp8: is about hidden rows of experts and feed-forwards",
        ),
        (["low_precision.dispatch=fp8"], "low_precision.dispatch = fp8: is about tokens on their way to other ranks"),
        (
            ["low_precision.recipe=mxfp8", "low_precision.out_proj_recipe=mxfp8"],
            "is what low_precision.recipe=mxfp8 does to all products",
        ),
        (["parallel.zero_stage=3"], "parallel.zero_stage = 3: gathers weights for each pass"),
        (["train.compile=true"], "train.compile = true: is not for low_precision.recipe=fp8_block"),
        (["kernels.backend=reference"], "kernels.backend = reference: computes step by step in float32"),
        (
            ["model.moe.shared_expert_linear_kind=lowrank", "model.moe.shared_expert_linear_rank=8"],
            "has products of two factors a matrix in blocks E, which no recipe supports; leave E out",
        ),
        (
            ["model.lora_mixer={num_experts: 2}"],
            "model.lora_mixer: changes what weights are on the way",
        ),
        (
            ["model.moe.expert_hidden_size=40"],
            "multiples of 16, and experts.up of blocks E is 40 x 64 there; leave E out of low_precision.block_types",
        ),
        (
            ["model.moe.bias=true"],
            "biases of experts, which are columns of their matrices; leave E out of low_precision.block_types",
        ),
        (["model.mamba.num_heads=15"], "in_proj.weight of blocks M is 527 x 64 there"),
        (["parallel.tensor=2", "low_precision.recipe=mxfp8"], "in_proj.weight of blocks M is 296 x 64 there"),
    ],
)
def test_what_cannot_take_effect_or_was_not_built_is_refused(changes, message, base):
    with pytest.raises(ConfigError) as caught:
        check_run(load_config(base, [*NARROW, *changes]))
    assert message in str(caught.value)


def test_emulated_products_take_any_width(base):
    check_run(load_config(base, [*NARROW, "model.moe.expert_hidden_size=40", "low_precision.emulate=true"]))


def test_a_refusal_names_file_and_line(base, tmp_path):
    path = tmp_path / "narrow.yaml"
    path.write_text(f"extends: {base}\nlow_precision:\n  block_types: K\n  recipe: mxfp8\n")
    with pytest.raises(ConfigError, match=r"narrow\.yaml:3: low_precision\.block_types = K: names K"):
        load_checked(path)


def test_a_device_without_the_products_is_refused_unless_they_are_emulated(base):
    config, cpu = load_config(base, NARROW), torch.device("cpu")
    with pytest.raises(ConfigError, match=r"fp8_block: has products on sm_90 and later, and this run is on a CPU; use"):
        check_device(config, cpu)
    with pytest.raises(ConfigError, match=r"mxfp8: has products on sm_100 and later, and this run is on a CPU; use"):
        check_device(load_config(base, [*NARROW, "low_precision.recipe=mxfp8"]), cpu)
    check_device(load_config(base, [*NARROW, "low_precision.emulate=true"]), cpu)
    check_device(load_config(base), cpu)


def test_nvfp4_in_all_blocks_is_warned_of(base):
    nvfp4 = [*NARROW, "low_precision.recipe=nvfp4"]
    assert "low_precision.bf16_last_layers=0.15 does that" in (
        warn_of_recipe(load_config(base, nvfp4).low_precision) or ""
    )
    assert warn_of_recipe(load_config(base, [*nvfp4, "low_precision.bf16_last_layers=0.15"]).low_precision) is None
    assert warn_of_recipe(load_config(base, NARROW).low_precision) is None
