"""Build the mixer of a block from its symbol in the pattern.

Its class is found in the table of kinds and imported only when a pattern uses it, so a package costs nothing where it is
not used, and its mixer is built exactly as a built-in one.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from amfm.model.config.kinds import kind_of
from amfm.model.config.plugins import load_named, until_registered
from amfm.model.config.schema import ModelConfig
from amfm.model.mixers.interface import BuildContext, Mixer
from amfm.model.parallel.groups import ProcessGroupCollection, single_rank_groups
from amfm.model.parallel.layers import RMSNorm

if TYPE_CHECKING:
    from amfm.model.streams.interface import StreamReader


def build_mixer(index: int, config: ModelConfig, groups: ProcessGroupCollection, backend: str) -> Mixer:
    """Build the mixer of block `index` of all that are built (`ModelConfig.built_letters`), this rank's part of it.

    Global indices keep a block the same wherever a pipeline cuts the model. No collectives. Raises ValueError for a name
    that nothing registers and for sizes that the ranks cannot share.
    """
    # Depth among only sequence mixers: decays that weaken with depth (lightning, HGRN2) must not depend on MoE blocks.
    # A block of multi-token prediction is as deep as the last of them: the main model is the same with and without.
    sequence = [place for place, symbol in enumerate(config.letters) if kind_of(symbol).mixes == "sequence"]
    order = sequence.index(index) if index in sequence else max(0, len(sequence) - 1)
    symbol = config.built_letters[index]
    alike = [place for place, other in enumerate(config.built_letters) if other == symbol]
    build = BuildContext(
        config.hidden_size,
        config.norm_epsilon,
        order,
        max(1, len(sequence)),
        groups,
        backend,
        config.mixers,
        config.self_guided_training,
        alike.index(index),
        len(alike),
    )
    mixer: Mixer = kind_of(symbol).load()(config.block_options(symbol), build)
    return mixer


@until_registered
@lru_cache(maxsize=256)
def sample_mixer(config: ModelConfig, symbol: str, index: int | None = None) -> Mixer:
    """A whole mixer of this symbol without storage, to ask for names, shapes and counts; of block `index`, by default the first."""
    if symbol not in config.built_letters:  # one of several side by side
        config = config.model_copy(update={"pattern": symbol, "mtp": None})
    with torch.device("meta"):
        place = config.built_letters.index(symbol) if index is None else index
        return build_mixer(place, config, single_rank_groups(), "torch")


def build_norm(config: ModelConfig, backend: str, groups: ProcessGroupCollection) -> RMSNorm:
    """A norm of the residual stream, of the kind that the model has."""
    if config.norm == "layernorm":
        from amfm.model.parallel.layer_norm import LayerNorm

        return LayerNorm(config.hidden_size, config.norm_epsilon, backend, groups)
    return RMSNorm(config.hidden_size, config.norm_epsilon, backend, groups)


def build_stream(index: int | None, config: ModelConfig, groups: ProcessGroupCollection) -> StreamReader | None:
    """What block `index` reads the residual stream with, None: the final norm. Nothing is built where the stream is a sum.

    Blocks of MTP layers begin at the normed stream, and read a sum.
    """
    number = len(config.letters)
    if config.stream is None or (index is not None and index >= number):
        return None
    reader: StreamReader = load_named(config.stream.reader)(
        config.stream, number if index is None else index, config, groups
    )
    return reader


@lru_cache(maxsize=256)
def stream_shapes(config: ModelConfig, *, is_final: bool) -> dict[str, tuple[int, ...]]:
    """Weights with which a block reads the residual stream, or the final norm, by name; none where the stream is a sum."""
    with torch.device("meta"):
        reader = build_stream(None if is_final else 0, config, single_rank_groups())
    return {} if reader is None else {name: tuple(weight.shape) for name, weight in reader.named_parameters()}
