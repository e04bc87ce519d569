"""The kinds of block whose costs are known in closed form; all others are planned as one that is built says."""

from __future__ import annotations

from amfm.launch.plan.blocks.attention import PlannedAttention
from amfm.launch.plan.blocks.block import PlannedBlock
from amfm.launch.plan.blocks.feed_forward import PlannedFeedForward
from amfm.launch.plan.blocks.mamba2 import PlannedMamba2
from amfm.launch.plan.blocks.moe import PlannedMoe
from amfm.model.config.attention import AttentionConfig
from amfm.model.config.feed_forward import FeedForwardConfig
from amfm.model.config.mamba2 import Mamba2Config
from amfm.model.config.moe import MoeConfig
from amfm.model.config.options import MixerOptions
from amfm.pretrain.config.schema import RunConfig

KNOWN: dict[type[MixerOptions], type[PlannedBlock]] = {
    Mamba2Config: PlannedMamba2,
    AttentionConfig: PlannedAttention,
    MoeConfig: PlannedMoe,
    FeedForwardConfig: PlannedFeedForward,
}


def planned_block(config: RunConfig, letter: str) -> PlannedBlock:
    """The blocks of a symbol of the pattern, as the planner sees them."""
    options = config.model.block_options(letter)
    return KNOWN.get(type(options), PlannedBlock)(config, letter, options)
