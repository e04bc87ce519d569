"""Parameter and FLOP counts of a model, only from its configuration: nothing is allocated.

Kinds: `mamba`, `attention`, `moe`, `feed_forward`, registered mixers by name, `embedding`, `head`, `final_norm`, and `mtp` for
all of multi-token prediction; a block's norm counts with the block. A mixer is counted on one that is built on the meta
device, so that no kind repeats its shapes in a formula; torch is imported only then.

FLOPs are those of the model and not of the program that computes it: recomputed activations, the chunked form of a scan
and padding do not count. A utilisation computed from them can therefore be compared between kernels and settings.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from amfm.model.config.pattern import block_kind
from amfm.model.config.plugins import until_registered
from amfm.model.config.schema import ModelConfig


@dataclass(frozen=True)
class Counts:
    """Numbers of parameters; `active` counts those that one token passes (top_k of the routed experts)."""

    total: int
    active: int
    total_by_kind: dict[str, int]
    active_by_kind: dict[str, int]


def count_parameters(config: ModelConfig) -> Counts:
    """Count the parameters by kind; a tied head counts once, as the embedding. Buffers do not count."""
    total: dict[str, int] = {"embedding": config.vocab_size * config.hidden_size}
    active = dict(total)
    for symbol, number in config.parsed_pattern.counts().items():
        whole, used = block_parameters(config, symbol)
        if config.block_options(symbol).differs_by_block():
            total[block_kind(symbol)] = active[block_kind(symbol)] = _all_of_kind(config, symbol)
            continue
        total[block_kind(symbol)] = number * whole
        active[block_kind(symbol)] = number * used
    for counts in (total, active):
        counts["final_norm"] = len(config.norm_parts()) * config.hidden_size
        counts["head"] = 0 if config.tie_embeddings else _head_parameters(config)
        if config.stream is not None:
            blocks = len(config.letters) * reader_parameters(config)
            counts["residual_stream"] = blocks + reader_parameters(config, is_final=True)
    if config.num_depths:
        total["mtp"], active["mtp"] = _depth_parameters(config)
    return Counts(sum(total.values()), sum(active.values()), total, active)


def flops_per_token(config: ModelConfig, sequence_length: int) -> dict[str, float]:
    """Estimate the training FLOPs of one token by kind: three times the forward pass.

    A multiply and an add are two. Matrices count as 2 a weight; causal attention counts the (T + 1) / 2 keys that a token
    sees on average in a row of T = sequence_length; the Mamba2 scan counts the recurrence itself (5 a state number),
    whichever chunk size computes it. Norms, activations and the embedding's look-up count as nothing.
    """
    flops = {"head": head_flops(config)}
    for symbol, number in config.parsed_pattern.counts().items():
        flops[block_kind(symbol)] = number * block_flops(config, symbol, sequence_length)
    if config.stream is not None and config.stream.flops(config.hidden_size):
        flops["residual_stream"] = 3 * len(config.letters) * config.stream.flops(config.hidden_size)
    if config.num_depths:
        flops["mtp"] = depth_flops(config, sequence_length)
    return flops


def depth_flops(config: ModelConfig, sequence_length: int) -> float:
    """Training FLOPs of one token in all MTP layers: their projections, blocks and heads."""
    letters = config.parsed_pattern.depth_letters
    blocks = sum(block_flops(config, symbol, sequence_length) for symbol in letters)
    return config.num_depths * (blocks + depth_projection_flops(config) + head_flops(config))


def depth_projection_flops(config: ModelConfig) -> float:
    """Training FLOPs of one token in the projection [D, 2 D] of one depth."""
    return 6.0 * 2 * config.hidden_size**2


def block_flops(config: ModelConfig, symbol: str, sequence_length: int) -> float:
    """Training FLOPs of one token in one block, counted as in `flops_per_token`.

    Backward has two products for each one of forward (for the input and for the weight), hence three times.
    """
    return 3.0 * (_block_forward_flops(config, symbol, sequence_length) + 2.0 * _routed_updates(config, symbol))


def head_flops(config: ModelConfig) -> float:
    """Training FLOPs of one token in the head, counted as in `flops_per_token`."""
    return 6.0 * _head_parameters(config)


def reader_parameters(config: ModelConfig, *, is_final: bool = False) -> int:
    """Parameters with which one block, or the final norm, reads the residual stream; none where it is a sum."""
    if config.stream is None:
        return 0
    from amfm.model.build import stream_shapes

    return sum(map(math.prod, stream_shapes(config, is_final=is_final).values()))


def _head_parameters(config: ModelConfig) -> int:
    """Parameters of the head: of the matrix, or of what a package has in its place."""
    if config.head is None:
        return config.vocab_size * config.hidden_size
    from amfm.model.head import head_shapes

    return sum(math.prod(shape) for shape in head_shapes(config).values())


def _depth_parameters(config: ModelConfig) -> tuple[int, int]:
    """(total, active) parameters of all modules of multi-token prediction: projection, three norms, and blocks."""
    own = 2 * config.hidden_size**2 + 3 * len(config.norm_parts()) * config.hidden_size
    blocks = [block_parameters(config, symbol) for symbol in config.parsed_pattern.depth_letters]
    total, active = (own + sum(counts) for counts in zip(*blocks))
    return config.num_depth_modules * total, config.num_depth_modules * active


class Weights(NamedTuple):
    """Numbers of parameters of one mixer: all, those that one token passes, those of them in matrices, and routed experts'."""

    total: int
    active: int
    matrices: int
    routed: int


@until_registered
@lru_cache(maxsize=256)
def count_weights(config: ModelConfig, symbol: str) -> Weights:
    """Count the parameters of a mixer of this symbol, on one that is built without storage."""
    from amfm.model.build import sample_mixer
    from amfm.model.parallel.shards import parameter_shards

    total = matrices = routed = unread = 0
    for name, weight, shard in parameter_shards(sample_mixer(config, symbol)):
        total += weight.numel()
        if name.endswith("tables"):
            unread += weight.numel() - config.block_options(symbol).rows_read() * weight.shape[1]
        elif weight.dim() > 1 and not name.endswith("bias"):  # the taps of a convolution are a matrix, too
            matrices += weight.numel()
            routed += weight.numel() * shard.per_expert
    options = config.block_options(symbol)
    chosen = options.routed_experts()
    idle = routed - routed * getattr(options, "top_k", chosen) // chosen if chosen else 0
    return Weights(total, total - idle - unread, matrices - idle, routed)


def block_parameters(config: ModelConfig, symbol: str) -> tuple[int, int]:
    """(total, active) parameters of one block with its norms."""
    rest, weights = (
        config.norms_per_block() * len(config.norm_parts()) * config.hidden_size + _routed_updates(config, symbol),
        count_weights(config, symbol),
    )
    return weights.total + rest, weights.active + rest


def _block_forward_flops(config: ModelConfig, symbol: str, sequence_length: int) -> float:
    """Forward FLOPs of one token in one block: 2 a weight that it passes, then what mixes over the sequence."""
    from amfm.model.build import sample_mixer

    mixing = sample_mixer(config, symbol).sequence_flops(sequence_length)
    return 2.0 * count_weights(config, symbol).matrices + mixing


@lru_cache(maxsize=256)
def _routed_updates(config: ModelConfig, symbol: str) -> int:
    """Parameters of a block's router and low-rank updates, which all tokens are multiplied by."""
    if config.lora_mixer is None:
        return 0
    from amfm.model.routed_updates import update_shapes

    return sum(math.prod(shape) for shape in update_shapes(config, symbol).values())


def _all_of_kind(config: ModelConfig, symbol: str) -> int:
    """Parameters of all main blocks of a kind whose blocks differ, with their norms; of one, `block_parameters` says the first's."""
    from amfm.model.shapes import block_shapes

    places = [index for index, other in enumerate(config.letters) if other == symbol]
    shapes = [shape for place in places for shape in block_shapes(config, symbol, place).values()]
    return len(places) * config.norms_per_block() * len(config.norm_parts()) * config.hidden_size + sum(
        math.prod(shape) for shape in shapes
    )
