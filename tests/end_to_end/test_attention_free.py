"""A model of only gated units, short convolutions and gated feed-forwards: no attention, a state that does not grow, and a loss."""

from __future__ import annotations

from pathlib import Path

import pytest

from amfm.model.config.schema import ModelConfig
from amfm.model.hybrid import HybridModel
from amfm.model.parallel.groups import single_rank_groups
from amfm.model.state_size import state_bytes
from tests.helpers.text.plays import held_out_loss, train

# Two blocks of each; the inner width of `*-` is such that both models have as many weights, 0.26M.
FORMS = {"gated units": ("C-C-", 352), "gated units without tokens before": ("----", 208), "attention": ("*-*-", 352)}


def config_of(form: str) -> ModelConfig:
    pattern, inner = FORMS[form]
    return ModelConfig.model_validate(
        {
            "pattern": pattern,
            "vocab_size": 256,
            "hidden_size": 96,
            "attention": {"num_heads": 3, "num_kv_heads": 3, "head_dim": 32, "positions": "rope"},
            "feed_forward": {"hidden_size": inner, "activation": "swiglu"},
            "mixers": {"short_conv": {"conv_kernel": 4}},
        }
    )


def test_its_state_has_the_same_bytes_after_any_text() -> None:
    gated, attention = (FORMS["gated units"], FORMS["attention"])
    assert gated[0].count("C") == attention[0].count("*")
    assert state_bytes(config_of("gated units"), 8) == state_bytes(config_of("gated units"), 64) == 2 * 3 * 96 * 4
    assert state_bytes(config_of("attention"), 64) == 8 * state_bytes(config_of("attention"), 8)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_gated_units_learn_text_nearly_as_attention_does_in_few_steps(plays: Path, seed: int) -> None:
    found = {}
    for form in FORMS:
        model = HybridModel(config_of(form), single_rank_groups(), seed=seed)
        train(model, plays, 120, peak=4e-3, seed=seed)
        found[form] = held_out_loss(model, plays)
    print(f"seed {seed}: " + ", ".join(f"{form} {loss:.3f}" for form, loss in found.items()))
    assert found["gated units"] < found["gated units without tokens before"] - 0.1
    assert found["gated units"] < found["attention"] + 0.1
