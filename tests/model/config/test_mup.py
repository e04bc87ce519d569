"""muP: which parameters shrink with the width and by how much, and what is rejected."""

import pytest

from amfm.model.config.checks import check_model
from amfm.model.config.core_options import AttentionConfig, FeedForwardConfig
from amfm.model.config.moe import MoeConfig
from amfm.model.config.mup import WidthScales, logits_multiplier, width_scales, without_mup
from amfm.model.config.schema import ModelConfig, MupConfig
from amfm.model.huggingface.classes import choose_target, explain_unfit


def config(pattern: str = "*E-", **changes: object) -> ModelConfig:
    sizes = {
        "pattern": pattern,
        "vocab_size": 11,
        "hidden_size": 64,
        "attention": AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=16),
        "moe": MoeConfig(num_experts=4, top_k=2, expert_hidden_size=32, shared_expert_hidden_size=32),
        "feed_forward": FeedForwardConfig(hidden_size=128),
        "mup": MupConfig(base_hidden_size=16),
    }
    return ModelConfig.model_validate(sizes | changes)


WIDE = WidthScales(0.5, 0.25, 0.25)
OUT = WidthScales(0.25, 0.25)
SAME = WidthScales()


@pytest.mark.parametrize(
    ("name", "scales"),
    [
        ("embedding.weight", SAME),
        ("blocks.0.mixer.q_proj.weight", WIDE),
        ("blocks.0.mixer.o_proj.weight", WIDE),
        ("blocks.0.norm.weight", SAME),
        ("blocks.1.mixer.experts.up", WIDE),
        ("blocks.1.mixer.experts.down.3", WIDE),
        ("blocks.1.mixer.router.weight", OUT),
        ("blocks.1.mixer.shared_gate.weight", OUT),
        ("blocks.2.mixer.conv.weight", SAME),
        ("blocks.2.mixer.A_log", SAME),
        ("blocks.2.mixer.dt_bias", SAME),
        ("blocks.2.mixer.norm.weight", SAME),
        ("blocks.2.mixer.decay_proj", SAME),
        ("blocks.2.mixer.shared_proj", WIDE),
        ("final_norm.weight", SAME),
        ("head.weight", OUT),
    ],
)
def test_each_class_of_parameters_has_its_factors(name: str, scales: WidthScales) -> None:
    assert width_scales(name, config()) == scales
    assert width_scales(name, config(mup=None)) == SAME
    assert width_scales(name, config(hidden_size=16)) == SAME


def test_a_tied_head_divides_the_logits_and_a_head_of_its_own_does_not() -> None:
    assert logits_multiplier(config()) == 1.0
    assert logits_multiplier(config(tie_embeddings=True)) == 0.25


def test_readers_of_weights_see_a_plain_model() -> None:
    assert without_mup(config()) == config(mup=None)
    assert choose_target(config("*-", mup=None)) == choose_target(config("*-"))
    tied = config("*-", tie_embeddings=True)
    assert without_mup(tied).multipliers.logits == 0.25
    assert any("multipliers.logits=0.25" in reason for reason in explain_unfit(tied, "nemotron_h"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"pattern": "*L", "mixers": {"lightning": {"num_heads": 4, "head_dim": 16}}},
            "not shown to hold for blocks '{lightning}' of model.pattern.*remove model.mup",
        ),
        ({"pattern": "*-/*-", "mtp": {}}, "MTP layers after '/' of model.pattern"),
        (
            {"feed_forward": {"hidden_size": 128, "linear_kind": "lowrank", "linear_rank": 4}},
            "model.feed_forward.linear_kind=lowrank has no muP rule; use dense",
        ),
    ],
)
def test_what_was_not_measured_is_refused(changes: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_model(config(**changes))  # type: ignore[arg-type]
