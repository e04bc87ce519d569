"""Which classes of transformers hold a model, with the reason for each that does not; each is a value in a file of its family."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import get_args

import pytest

from amfm.model.config.core_options import AttentionConfig, FeedForwardConfig, Mamba2Config
from amfm.model.config.rope import RopeConfig
from amfm.model.config.schema import MultipliersConfig
from amfm.model.huggingface.classes import (
    BY_NAME,
    BY_TYPE,
    CLASSES,
    NATIVE_TARGETS,
    TARGETS,
    choose_target,
    explain_unfit,
    unfit_for_all,
)
from amfm.model.huggingface.hf_class import Target
from amfm.model.huggingface.plain.families import FAMILIES
from tests.model.huggingface.cases import (
    GRANITE,
    KDA,
    KIMI_LINEAR,
    MLA,
    NEMOTRON_H,
    QWEN3_NEXT,
    deepseek_v3_config,
    deepseek_v32_config,
    deepseek_v32_mixers,
    delta_mixers,
    falcon_h1_config,
    gpt_oss_config,
    gpt_oss_window,
    granite_config,
    grouped,
    kimi_linear_config,
    lfm2_config,
    lfm2_moe_config,
    nemotron_h_config,
    qwen3_5_moe_config,
    qwen3_next_config,
)

FOLDER = Path(__file__).parents[3] / "model" / "huggingface"


def test_every_class_is_in_one_file_of_the_folder_or_in_the_table_and_every_target_is_written() -> None:
    plain = {family.name for family in FAMILIES}
    files = [
        import_module(f"amfm.model.huggingface.{path.stem}")
        for path in FOLDER.iterdir()
        if not path.stem.startswith("_") and path.stem not in ("classes", "latent", "plain")
    ]
    for found in CLASSES:
        places = [
            file for file in files for name, value in vars(file).items() if name.endswith("CLASS") and value is found
        ]
        assert found.name in plain or len(places) == 1, found.name
    assert set(TARGETS) == set(get_args(Target)) == {*NATIVE_TARGETS, "own"}
    assert len(BY_NAME) == len(BY_TYPE) == len(CLASSES)


def test_the_names_of_the_classes_need_no_torch() -> None:
    code = "import sys, amfm.model.huggingface.hf_class; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


ROTARY, SPARSE = lfm2_config().attention, lfm2_moe_config()
SINKS = gpt_oss_config().attention
GPT_OSS = gpt_oss_config().moe
SIDE_BY_SIDE = falcon_h1_config().attention
UNFIT = {
    "falcon_h1": {
        "model.pattern=(M&*)(M&*)-": {"pattern": "(M&*)(M&*)-"},
        "model.pattern=M-*-": {"pattern": "M-*-"},
        "model.attention.qk_norm=true": {"attention": SIDE_BY_SIDE.model_copy(update={"qk_norm": True})},
        "model.attention.positions=none": {
            "attention": SIDE_BY_SIDE.model_copy(update={"positions": "none", "rope": RopeConfig()})
        },
        "model.attention.rope.fraction=0.5": {
            "attention": SIDE_BY_SIDE.model_copy(update={"rope": RopeConfig(fraction=0.5)})
        },
        "model.attention.gate=head": {"attention": SIDE_BY_SIDE.model_copy(update={"gate": "head"})},
        "model.attention.bias=true: falcon_h1 is": {"attention": SIDE_BY_SIDE.model_copy(update={"bias": True})},
        "model.attention.sinks=true: falcon_h1 has no sinks": {
            "attention": SIDE_BY_SIDE.model_copy(update={"sinks": True})
        },
        "model.feed_forward.activation=squared_relu": {"feed_forward": FeedForwardConfig(hidden_size=20)},
        "model.multipliers.residual=0.5": {"multipliers": MultipliersConfig(residual=0.5)},
    },
    "gpt_oss": {
        "model.pattern=W*EE": {"pattern": "W*EE"},
        "model.attention.sinks=false": {"attention": SINKS.model_copy(update={"sinks": False})},
        "model.attention.qk_norm=true": {"attention": SINKS.model_copy(update={"qk_norm": True})},
        "model.attention.rope.fraction=0.5": {
            "attention": SINKS.model_copy(update={"rope": RopeConfig(theta=200.0, fraction=0.5)})
        },
        "model.attention.rope.scaling=ntk: gpt_oss rotates windows as attention": {
            "attention": SINKS.model_copy(update={"rope": RopeConfig(theta=200.0, scaling="ntk", ntk_alpha=2.0)})
        },
        "model.attention.softmax_scale=0.3": {"attention": SINKS.model_copy(update={"softmax_scale": 0.3})},
        "model.attention.gate=element": {"attention": SINKS.model_copy(update={"gate": "element"})},
        "model.mixers.window.yarn: gpt_oss rotates windows as attention": {
            "mixers": gpt_oss_window(yarn={"factor": 4.0, "original_length": 16})
        },
        "model.mixers.window.sinks=false": {"mixers": gpt_oss_window(sinks=False)},
        "model.mixers.window.gate=head": {"mixers": gpt_oss_window(gate="head")},
        "model.mixers.window.bias=true: windows of gpt_oss have that": {"mixers": gpt_oss_window(bias=True)},
        "model.mixers.window.num_kv_heads=1": {"mixers": gpt_oss_window(num_kv_heads=1)},
        "model.mixers.window.rope_theta=300.0": {"mixers": gpt_oss_window(rope_theta=300.0)},
        "model.moe.activation=swiglu: in gpt_oss, experts have this unit": {
            "moe": grouped(GPT_OSS, activation="swiglu")
        },
        "model.moe.activation_limit=none": {"moe": grouped(GPT_OSS, activation_limit=None)},
        "model.moe.router=sigmoid": {"moe": grouped(GPT_OSS, router="sigmoid")},
        "model.moe.normalize_probabilities=false": {"moe": grouped(GPT_OSS, normalize_probabilities=False)},
        "model.moe.shared_expert_hidden_size=8": {"moe": grouped(GPT_OSS, shared_expert_hidden_size=8)},
        "model.moe.expert_hidden_size=12": {"moe": grouped(GPT_OSS, expert_hidden_size=12)},
        "model.multipliers.logits=0.5": {"multipliers": MultipliersConfig(logits=0.5)},
    },
    "lfm2": {
        "model.pattern=C-C*-": {"pattern": "C-C*-"},
        "model.attention.qk_norm=false": {"attention": ROTARY.model_copy(update={"qk_norm": False})},
        "model.attention.positions=none": {"attention": ROTARY.model_copy(update={"positions": "none"})},
        "model.attention.rope.fraction=0.5": {
            "attention": ROTARY.model_copy(update={"rope": RopeConfig(fraction=0.5)})
        },
        "model.attention.head_dim=8": {"attention": ROTARY.model_copy(update={"head_dim": 8})},
        "model.attention.softmax_scale=0.3": {"attention": ROTARY.model_copy(update={"softmax_scale": 0.3})},
        "model.attention.gate=element": {"attention": ROTARY.model_copy(update={"gate": "element"})},
        "model.attention.sinks=true: lfm2 has no sinks": {"attention": ROTARY.model_copy(update={"sinks": True})},
        "model.feed_forward.activation=squared_relu": {"feed_forward": FeedForwardConfig(hidden_size=20)},
        "model.multipliers.logits=0.5": {"multipliers": MultipliersConfig(logits=0.5)},
    },
    "lfm2_moe": {
        "model.pattern=CEC-*E": {"pattern": "CEC-*E"},
        "model.pattern=C-C-*-": {"pattern": "C-C-*-"},
        "model.attention.qk_norm=false": {"attention": ROTARY.model_copy(update={"qk_norm": False})},
        "model.moe.shared_expert_hidden_size=16": {"moe": grouped(SPARSE.moe, shared_expert_hidden_size=16)},
        "model.moe.router=softmax": {"moe": grouped(SPARSE.moe, router="softmax", expert_bias=False)},
        "model.moe.latent_size=8": {"moe": grouped(SPARSE.moe, latent_size=8)},
        "model.moe.activation=squared_relu": {"moe": grouped(SPARSE.moe, activation="squared_relu")},
    },
    "kimi_linear": {
        "model.pattern=K-E": {"pattern": "K-E"},
        "model.mixers.kda.value_head_dim=5": {"mixers": {"kda": KDA | {"value_head_dim": 5}, "mla": MLA}},
        "model.mixers.kda.gate_rank=3": {"mixers": {"kda": KDA | {"gate_rank": 3}, "mla": MLA}},
        "model.mixers.kda.allow_negative_eigenvalues=true": {
            "mixers": {"kda": KDA | {"allow_negative_eigenvalues": True}, "mla": MLA}
        },
        "model.mixers.kda.conv_kernel=0": {"mixers": {"kda": KDA | {"conv_kernel": 0}, "mla": MLA}},
        "model.mixers.mla.positions=rope": {"mixers": {"kda": KDA, "mla": MLA | {"positions": "rope"}}},
        "model.mixers.mla.gate=head": {"mixers": {"kda": KDA, "mla": MLA | {"gate": "head"}}},
        "model.mixers.mla.latent_norm_epsilon=1e-05": {
            "mixers": {"kda": KDA, "mla": MLA | {"latent_norm_epsilon": 1e-5}}
        },
        "model.moe.router=softmax": {"moe": grouped(KIMI_LINEAR.moe, router="softmax", expert_bias=False)},
        "model.moe.shared_expert_hidden_size=24": {"moe": grouped(KIMI_LINEAR.moe, shared_expert_hidden_size=24)},
        "model.moe.shared_expert_gate=true": {"moe": grouped(KIMI_LINEAR.moe, shared_expert_gate=True)},
        "model.moe.latent_size=8": {"moe": grouped(KIMI_LINEAR.moe, latent_size=8)},
        "model.moe.num_experts=4 in num_router_groups=4": {"moe": grouped(KIMI_LINEAR.moe, num_router_groups=4)},
        "model.feed_forward.activation=squared_relu": {"feed_forward": FeedForwardConfig(hidden_size=20)},
        "model.multipliers.residual=0.5": {"multipliers": MultipliersConfig(residual=0.5)},
    },
    "deepseek_v3": {
        "model.pattern=+E+-": {"pattern": "+E+-"},
        "model.pattern=K-+E": {"pattern": "K-+E", "mixers": {"kda": KDA, "mla": MLA | {"positions": "rope"}}},
        "model.mixers.mla.positions=none": {"mixers": {"mla": MLA}},
    },
    "deepseek_v32": {
        "model.pattern=+E+-": {"pattern": "+E+-"},
        "model.mixers.mla.gate=head": {"mixers": deepseek_v32_mixers(gate="head")},
        "model.mixers.mla.indexer is missing": {"mixers": deepseek_v32_mixers() | {"mla": MLA | {"positions": "rope"}}},
        "model.mixers.mla.query_latent_size is missing": {"mixers": deepseek_v32_mixers(query_latent_size=None)},
        "model.mixers.mla.indexer.stage=warm_up": {"mixers": deepseek_v32_mixers(indexer={"stage": "warm_up"})},
        "model.mixers.mla.indexer.rope_fraction=1.0": {"mixers": deepseek_v32_mixers(indexer={"rope_fraction": 1.0})},
    },
    "nemotron_h": {
        "model.moe.activation=swiglu": {"moe": grouped(NEMOTRON_H.moe, activation="swiglu")},
        "model.moe.router=softmax": {"moe": grouped(NEMOTRON_H.moe, router="softmax")},
        "num_router_groups=4": {"moe": grouped(NEMOTRON_H.moe, num_router_groups=4, router_group_top_k=2)},
        "model.moe.group_score_top_k=1": {
            "moe": grouped(NEMOTRON_H.moe, num_router_groups=2, router_group_top_k=1, group_score_top_k=1)
        },
        "model.moe.expert_hidden_size=12": {"moe": grouped(NEMOTRON_H.moe, expert_hidden_size=12)},
        "model.moe.latent_size=6": {"moe": grouped(NEMOTRON_H.moe, latent_size=6)},
        "model.hidden_size=20": {"hidden_size": 20},
        "model.feed_forward.activation=swiglu": {
            "feed_forward": FeedForwardConfig(hidden_size=20, activation="swiglu")
        },
        "model.attention.positions=rope": {
            "attention": AttentionConfig(num_heads=4, num_kv_heads=1, head_dim=12, positions="rope")
        },
        "model.attention.qk_norm=true": {
            "attention": AttentionConfig(num_heads=4, num_kv_heads=1, head_dim=12, qk_norm=True)
        },
        "model.attention.softmax_scale=0.5": {
            "attention": AttentionConfig(num_heads=4, num_kv_heads=1, head_dim=12, softmax_scale=0.5)
        },
        "model.attention.gate=element": {
            "attention": AttentionConfig(num_heads=4, num_kv_heads=1, head_dim=12, gate="element")
        },
        "model.moe.shared_expert_gate=true": {"moe": grouped(NEMOTRON_H.moe, shared_expert_gate=True)},
        "model.multipliers.residual=0.5": {"multipliers": MultipliersConfig(residual=0.5)},
    },
    "granitemoehybrid": {
        "model.pattern=MM*E": {"pattern": "MM*E"},
        "model.pattern=MEM": {"pattern": "MEM"},
        "model.pattern=MEM-": {
            "pattern": "MEM-",
            "feed_forward": FeedForwardConfig(hidden_size=8, activation="swiglu"),
        },
        "model.moe.activation=squared_relu": {"moe": grouped(GRANITE.moe, activation="squared_relu")},
        "model.moe.router=sigmoid": {"moe": grouped(GRANITE.moe, router="sigmoid")},
        "model.moe.normalize_probabilities=false": {"moe": grouped(GRANITE.moe, normalize_probabilities=False)},
        "model.moe.routed_scaling=2.5": {"moe": grouped(GRANITE.moe, routed_scaling=2.5)},
        "model.moe.num_router_groups=2": {"moe": grouped(GRANITE.moe, num_router_groups=2, router_group_top_k=2)},
        "model.moe.expert_bias=true": {"moe": grouped(GRANITE.moe, expert_bias=True)},
        "model.moe.latent_size=8": {"moe": grouped(GRANITE.moe, latent_size=8)},
        "model.feed_forward.activation=squared_relu": {
            "pattern": "M-",
            "feed_forward": FeedForwardConfig(hidden_size=8, activation="squared_relu"),
        },
        "head_dim=8 = 32": {"attention": AttentionConfig(num_heads=4, num_kv_heads=1, head_dim=8)},
        "model.attention.qk_norm=true": {
            "attention": AttentionConfig(num_heads=4, num_kv_heads=1, head_dim=6, qk_norm=True)
        },
        "model.attention.rope.fraction=0.5": {
            "attention": AttentionConfig(
                num_heads=4, num_kv_heads=1, head_dim=6, positions="rope", rope=RopeConfig(fraction=0.5)
            )
        },
        "= 28: granitemoehybrid needs": {"mamba": Mamba2Config(num_heads=7, head_dim=4, num_groups=1)},
    },
    "qwen3_next": {
        "model.pattern=GE*": {"pattern": "GE*"},
        "model.pattern=MEG-": {"pattern": "MEG-", "mamba": GRANITE.mamba},
        "allow_negative_eigenvalues=true": {"mixers": delta_mixers(allow_negative_eigenvalues=True)},
        "conv_kernel=0": {"mixers": delta_mixers(conv_kernel=0)},
        "model.attention.qk_norm=false": {"attention": QWEN3_NEXT.attention.model_copy(update={"qk_norm": False})},
        "model.attention.positions=none": {"attention": QWEN3_NEXT.attention.model_copy(update={"positions": "none"})},
        "model.attention.softmax_scale=0.5": {
            "attention": QWEN3_NEXT.attention.model_copy(update={"softmax_scale": 0.5})
        },
        "model.attention.gate=head": {"attention": QWEN3_NEXT.attention.model_copy(update={"gate": "head"})},
        "model.multipliers.logits=0.5": {"multipliers": MultipliersConfig(logits=0.5)},
        "model.moe.activation=squared_relu": {"moe": grouped(QWEN3_NEXT.moe, activation="squared_relu")},
        "model.moe.activation_limit=7.0: qwen3_next does not limit": {
            "moe": grouped(QWEN3_NEXT.moe, activation_limit=7.0)
        },
        "model.moe.router=sigmoid": {"moe": grouped(QWEN3_NEXT.moe, router="sigmoid")},
        "model.moe.routed_scaling=2.5": {"moe": grouped(QWEN3_NEXT.moe, routed_scaling=2.5)},
        "model.moe.num_router_groups=2": {"moe": grouped(QWEN3_NEXT.moe, num_router_groups=2, router_group_top_k=2)},
        "model.moe.expert_bias=true": {"moe": grouped(QWEN3_NEXT.moe, expert_bias=True)},
        "model.moe.latent_size=8": {"moe": grouped(QWEN3_NEXT.moe, latent_size=8)},
        "model.moe.expert_hidden_size=12": {"moe": grouped(QWEN3_NEXT.moe, expert_hidden_size=12)},
        "model.feed_forward.activation=squared_relu": {
            "feed_forward": FeedForwardConfig(hidden_size=8, activation="squared_relu"),
        },
    },
    "qwen3_5_moe": {
        "model.pattern=GE*-": {"pattern": "GE*-"},
        "model.moe.normalize_probabilities=false": {"moe": grouped(QWEN3_NEXT.moe, normalize_probabilities=False)},
        "in qwen3_5_moe, a softmax scores experts": {"moe": grouped(QWEN3_NEXT.moe, router="sigmoid")},
    },
}


BASES = {
    "nemotron_h": nemotron_h_config,
    "granitemoehybrid": granite_config,
    "qwen3_next": qwen3_next_config,
    "qwen3_5_moe": qwen3_5_moe_config,
    "kimi_linear": kimi_linear_config,
    "deepseek_v3": deepseek_v3_config,
    "deepseek_v32": deepseek_v32_config,
    "lfm2": lfm2_config,
    "lfm2_moe": lfm2_moe_config,
    "gpt_oss": gpt_oss_config,
    "falcon_h1": falcon_h1_config,
}


@pytest.mark.parametrize(
    ("target", "expected", "changes"),
    [(target, expected, changes) for target, cases in UNFIT.items() for expected, changes in cases.items()],
)
def test_each_choice_a_class_cannot_hold_is_named_with_a_remedy(target: str, expected: str, changes: dict) -> None:
    base = BASES[target]
    assert explain_unfit(base(), target) == []
    (reason,) = explain_unfit(base(**changes), target)
    assert expected in reason
    assert "; " in reason, "a fix is missing"
    assert "own" in reason
    assert choose_target(base(**changes)) != target
    assert explain_unfit(base(**changes), "own") == []


def test_sections_that_the_pattern_does_not_use_stop_no_target() -> None:
    config = nemotron_h_config(pattern="M-", moe=grouped(NEMOTRON_H.moe, activation="swiglu"))
    assert choose_target(config) == "nemotron_h"


@pytest.mark.parametrize(
    ("said", "changes"),
    [
        ("model.norm=layernorm", {"norm": "layernorm"}),
        (
            "model.feed_forward.bias=true",
            {"feed_forward": FeedForwardConfig(hidden_size=16, activation="swiglu", bias=True)},
        ),
        ("model.feed_forward.activation=gelu", {"feed_forward": FeedForwardConfig(hidden_size=16, activation="gelu")}),
    ],
)
def test_no_class_but_our_own_holds_layer_norms_biases_and_gelu(said: str, changes: dict) -> None:
    config = lfm2_config().model_copy(update=changes)
    assert choose_target(config) == "own" and any(said in reason for reason in explain_unfit(config, "lfm2"))


def test_unknown_target_is_refused() -> None:
    with pytest.raises(ValueError, match="'mamba2' is unknown; use auto, llama"):
        explain_unfit(NEMOTRON_H, "mamba2")


def test_a_model_that_a_class_and_our_own_hold_becomes_that_class() -> None:
    config = deepseek_v32_config()
    assert explain_unfit(config, "own") == unfit_for_all(config) == []
    assert choose_target(config) == "deepseek_v32"
