"""Rules between the fields of a model's configuration: each broken one is named with value, rule and fix."""

import pytest

from amfm.model.config.checks import check_model
from amfm.model.config.core_options import AttentionConfig, FeedForwardConfig, Mamba2Config
from amfm.model.config.moe import MoeConfig
from amfm.model.config.rope import RopeConfig
from amfm.model.config.schema import ModelConfig

MAMBA = {"num_heads": 6, "head_dim": 4, "state_size": 5, "num_groups": 2}
ATTENTION = {"num_heads": 6, "num_kv_heads": 2, "head_dim": 8}
MOE = {"num_experts": 8, "top_k": 2, "expert_hidden_size": 4}


def config(pattern="M*E-", *, mamba=None, attention=None, moe=None):
    return ModelConfig(
        pattern=pattern,
        vocab_size=11,
        hidden_size=8,
        mamba=Mamba2Config(**(MAMBA | (mamba or {}))),
        attention=AttentionConfig(**(ATTENTION | (attention or {}))),
        moe=MoeConfig(**(MOE | (moe or {}))),
        feed_forward=FeedForwardConfig(hidden_size=12),
    )


def test_a_sound_configuration_passes():
    check_model(config())
    check_model(config(attention={"positions": "rope", "rope": RopeConfig(scaling="ntk", ntk_alpha=50)}))
    yarn = RopeConfig(scaling="yarn", yarn_factor=8, yarn_original_length=64)
    check_model(config(attention={"positions": "rope", "rope": yarn}))
    check_model(config(moe={"num_router_groups": 4, "router_group_top_k": 2, "expert_bias": True}))


@pytest.mark.parametrize(
    ("letter", "section"), [("M", "mamba"), ("A", "attention"), ("F", "moe"), ("-", "feed_forward")]
)
def test_a_letter_without_its_section_is_refused(letter, section):
    with pytest.raises(ValueError, match=rf"model\.{section} is missing; add model\.{section}"):
        check_model(ModelConfig(pattern=letter, vocab_size=11, hidden_size=8))


def rope(**fields):
    return {"positions": "rope", "rope": RopeConfig(**fields)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pattern": "MQ"}, r"model\.pattern, character 2"),
        (
            {"moe": {"expert_hidden_size": 2**63}},
            r"expert_hidden_size=9223372036854775808 must be at most 2,147,483,647",
        ),
        ({"mamba": {"num_groups": 4}}, r"num_groups=4 must divide model\.mamba\.num_heads=6; use one of 1, 2, 3, 6"),
        ({"mamba": {"a_init_min": 17.0}}, r"a_init_min=17\.0 must not exceed model\.mamba\.a_init_max=16\.0"),
        ({"mamba": {"time_step_min": 1.0}}, r"time_step_min=1\.0 must not exceed"),
        ({"attention": {"num_kv_heads": 4}}, r"num_kv_heads=4 must divide model\.attention\.num_heads=6"),
        ({"attention": {"rope": RopeConfig(theta=500.0)}}, "positions=none never reads it"),
        ({"attention": rope(fraction=0.3)}, r"rotates 2\.4 channels"),
        ({"attention": rope(fraction=0.125)}, "rotates 1 channels"),
        ({"attention": rope(theta=1.0)}, r"theta=1\.0 must be above 1"),
        ({"attention": rope(scaling="ntk")}, r"needs model\.attention\.rope\.ntk_alpha; set it"),
        ({"attention": rope(ntk_alpha=50)}, "ntk_alpha=50.0 is only read with scaling: ntk, not none"),
        ({"attention": rope(scaling="ntk", ntk_alpha=50, fraction=0.25)}, "at least 4 rotated channels"),
        ({"attention": rope(scaling="yarn", yarn_factor=2)}, "yarn_original_length; set it"),
        ({"attention": rope(yarn_factor=2)}, "yarn_factor=2.0 is only read with scaling: yarn"),
        ({"attention": rope(yarn_beta_fast=20)}, "only read with scaling: yarn, not none"),
        (
            {"attention": rope(scaling="yarn", yarn_factor=2, yarn_original_length=8, yarn_beta_fast=1)},
            r"yarn_beta_slow=1\.0 must be under yarn_beta_fast=1\.0",
        ),
        ({"moe": {"top_k": 9}}, r"top_k=9 must be at most model\.moe\.num_experts=8"),
        ({"moe": {"num_router_groups": 3}}, r"num_router_groups=3 must divide model\.moe\.num_experts=8"),
        ({"moe": {"num_router_groups": 2, "router_group_top_k": 3}}, "router_group_top_k=3 must be at most"),
        ({"moe": {"num_router_groups": 8}}, r"leaves 1 expert\(s\) per group"),
        ({"moe": {"group_score_top_k": 1}}, "group_score_top_k=1 has no effect if every group may be used"),
        ({"moe": {"num_router_groups": 4, "top_k": 3}}, "top_k=3 must be at most the 2 experts"),
        (
            {"moe": {"router": "softmax", "expert_bias": True}},
            "expert_bias=true needs model.moe.router=sigmoid or sqrt_softplus",
        ),
        (
            {"moe": {"activation": "squared_relu", "activation_limit": 7.0}},
            r"model\.moe\.activation_limit=7\.0 has no effect with activation=squared_relu.*use swiglu, or remove it",
        ),
        (
            {"moe": {"overflow": "recycle"}},
            r"overflow=recycle needs model\.moe\.capacity_factor: .*set capacity_factor: 1\.5",
        ),
        (
            {"moe": {"overflow": "recycle", "capacity_factor": 0.9}},
            r"overflow=recycle needs model\.moe\.capacity_factor of at least 1, not 0\.9: .*use overflow: drop",
        ),
    ],
)
def test_a_broken_rule_is_named_with_value_and_remedy(changes, message):
    with pytest.raises(ValueError, match=message):
        check_model(config(**changes))
