"""What structure costs in loss: factored feed-forwards vs. dense ones, on the bytes of plays that are held out."""

from __future__ import annotations

from pathlib import Path

import pytest

from amfm.model.config.core_options import AttentionConfig, FeedForwardConfig
from amfm.model.config.schema import GuideConfig, ModelConfig
from amfm.model.hybrid import HybridModel
from amfm.model.parallel.groups import single_rank_groups
from tests.helpers.text.plays import held_out_loss, train

STEPS, PEAK = 220, 4e-3
# Parameters of the two feed-forwards: 147K dense, 46K of each other form.
FORMS = {
    "dense": FeedForwardConfig(hidden_size=384),
    "narrow": FeedForwardConfig(hidden_size=120),
    "lowrank": FeedForwardConfig(hidden_size=384, linear_kind="lowrank", linear_rank=24),
    "blockshuffle": FeedForwardConfig(hidden_size=384, linear_kind="blockshuffle", linear_blocks=4),
    "blockdense": FeedForwardConfig(hidden_size=384, linear_kind="blockdense", linear_rank=40, linear_blocks=4),
}


def train_on_bytes(folder: Path, form: str, seed: int, guide: GuideConfig | None = None) -> float:
    """Nats per byte on held-out plays after a run of a 0.27M-parameter model, or of 0.17M with factors."""
    config = ModelConfig(
        pattern="*-*-",
        vocab_size=256,
        hidden_size=96,
        attention=AttentionConfig(num_heads=3, num_kv_heads=3, head_dim=32, positions="rope"),
        feed_forward=FORMS[form],
        self_guided_training=guide,
    )
    model = HybridModel(config, single_rank_groups(), seed=seed)
    train(model, folder, STEPS, peak=PEAK, seed=seed)
    return held_out_loss(model, folder)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0])
def test_a_guide_helps_low_rank_and_block_shuffle_needs_none(plays: Path, seed: int) -> None:
    dense, shuffled = (train_on_bytes(plays, form, seed) for form in ("dense", "blockshuffle"))
    unguided, guided = (train_on_bytes(plays, "lowrank", seed, guide) for guide in (None, GuideConfig()))
    assert guided <= unguided - 0.04
    assert shuffled <= dense + 0.03
