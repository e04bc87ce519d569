"""From which rows attention to chosen keys is planned as the faster one."""

from __future__ import annotations

import pytest

from amfm.launch.plan.blocks.indexer import Pair, pays_from
from amfm.launch.plan.hardware import HARDWARE
from amfm.model.config.core_options import AttentionConfig
from amfm.model.config.key_mixer_options import IndexerConfig, MlaOptions
from amfm.model.config.options import MixerOptions

INDEXER = IndexerConfig(top_k=2048)
LATENTS = MlaOptions(num_heads=128, query_latent_size=1536, positions="rope", indexer=INDEXER)
GROUPED = AttentionConfig(num_heads=32, num_kv_heads=8, head_dim=128, indexer=INDEXER)


def test_a_pair_costs_the_products_of_its_heads_and_the_numbers_of_its_keys() -> None:
    # Two products of latents, 512 + 64 and 512 channels of 128 heads; of a tensor rank's eight heads and two key heads.
    latents, grouped = Pair.of(LATENTS), Pair.of(GROUPED, 4)
    assert (latents.scores, latents.values, latents.keys, latents.numbers) == (2 * 128 * 576, 2 * 128 * 512, 576, 576)
    assert (grouped.scores, grouped.values, grouped.keys, grouped.numbers) == (2 * 8 * 128, 2 * 8 * 128, 256, 512)


@pytest.mark.parametrize(("options", "length"), [(LATENTS, 43_000), (GROUPED, 508_000)], ids=["latents", "grouped"])
def test_the_more_heads_read_a_key_the_shorter_the_rows_from_which_it_pays(options: MixerOptions, length: int) -> None:
    assert pays_from(options, 7168, HARDWARE["h100"], "bf16") == pytest.approx(length, rel=0.02)
