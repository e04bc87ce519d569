"""Build the mixer of a block from its symbol in the pattern.

Four mixers have a section of their own in the configuration (`mamba`, `attention`, `moe`, `feed_forward`) and are imported
here. All others are found by name in the registry and imported only when a pattern uses them, so a plugin package costs
nothing where it is not used, and its mixer is built exactly as a built-in one.
"""

from __future__ import annotations

from torch import nn

from amfm.model.config.kinds import find_kind
from amfm.model.config.pattern import mixer_name
from amfm.model.config.schema import ModelConfig
from amfm.model.feed_forward import FeedForwardMixer
from amfm.model.mixers.attention import AttentionMixer
from amfm.model.mixers.interface import BuildContext
from amfm.model.mixers.mamba2 import Mamba2Mixer
from amfm.model.moe.block import MoeMixer
from amfm.model.parallel.groups import ProcessGroupCollection

# Blocks with a section of their own in the configuration.
CORE_MIXERS: dict[str, type[nn.Module]] = {
    "M": Mamba2Mixer,
    "*": AttentionMixer,
    "E": MoeMixer,
    "-": FeedForwardMixer,
}
# Blocks that treat each token by itself: they do not count in the depth that `BuildContext.order` gives.
CHANNEL_MIXERS = ("E", "-")


def build_mixer(index: int, config: ModelConfig, groups: ProcessGroupCollection, backend: str) -> nn.Module:
    """Build the mixer of block `index` of all that are built (`ModelConfig.built_letters`), this rank's part of it.

    Global indices keep a block the same wherever a pipeline cuts the model. No collectives. Raises ValueError for a name
    that nothing registers and for sizes that the ranks cannot share.
    """
    letters = config.built_letters
    name = mixer_name(letters[index])
    if name is None:
        return CORE_MIXERS[letters[index]](config, groups, backend)
    # Depth among sequence mixers alone: decays that weaken with depth (lightning, HGRN2) must not depend on MoE blocks.
    # A block of multi-token prediction is as deep as the last of them: the main model is the same with and without.
    sequence = [number for number, letter in enumerate(config.letters) if letter not in CHANNEL_MIXERS]
    order = sequence.index(index) if index in sequence else max(0, len(sequence) - 1)
    build = BuildContext(
        config.hidden_size, config.norm_epsilon, order, max(1, len(sequence)), groups, backend, config.mixers
    )
    options = getattr(config.mixers, name)
    assert options is not None, f"check_model was not called: model.mixers.{name} is missing"
    return find_kind(name).load()(options, build)
