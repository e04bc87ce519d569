"""Builds the mixer of a block from its symbol in the pattern."""

from __future__ import annotations

from torch import nn

from model.config.mixer_registry import find_spec
from model.config.pattern import mixer_name
from model.config.schema import ModelConfig
from model.feed_forward import FeedForwardMixer
from model.mixers.attention import AttentionMixer
from model.mixers.interface import BuildContext
from model.mixers.mamba2 import Mamba2Mixer
from model.moe.block import MoeMixer
from model.parallel.groups import ProcessGroupCollection

# Blocks with a section of their own in the configuration.
CORE_MIXERS: dict[str, type[nn.Module]] = {
    "M": Mamba2Mixer,
    "*": AttentionMixer,
    "E": MoeMixer,
    "-": FeedForwardMixer,
}
CHANNEL_MIXERS = ("E", "-")


def build_mixer(index: int, config: ModelConfig, groups: ProcessGroupCollection, backend: str) -> nn.Module:
    """Build the mixer of block `index` of the whole pattern, this rank's part of it.

    Raises ValueError for a name that nothing registers and for sizes that the ranks cannot share.
    """
    letters = config.letters
    name = mixer_name(letters[index])
    if name is None:
        return CORE_MIXERS[letters[index]](config, groups, backend)
    sequence = [number for number, letter in enumerate(letters) if letter not in CHANNEL_MIXERS]
    build = BuildContext(
        config.hidden_size, config.norm_epsilon, sequence.index(index), len(sequence), groups, backend, config.mixers
    )
    options = getattr(config.mixers, name)
    assert options is not None, f"check_model was not called: model.mixers.{name} is missing"
    return find_spec(name).load()(options, build)
