"""Parameter and FLOP counts of a model, only from its configuration: nothing is allocated.

Kinds: `mamba`, `attention`, `moe`, `feed_forward`, registered mixers by name, `embedding`, `head`, `final_norm`, and `mtp` for
all of multi-token prediction; a block's norm counts with the block. A mixer is counted on one that is built on the meta
device, so that no kind repeats its shapes in a formula; torch is imported only then.

FLOPs are those of the model and not of the program that computes it: recomputed activations, the chunked form of a scan
and padding do not count. A utilisation computed from them can therefore be compared between kernels and settings.

FLOPs of a token by Megatron-LM's formula, so that its TFLOP/s per GPU and ours can be compared.

What differs from `flops.py` is in docs/metrics.md: an inner width of Mamba2 of twice the residual stream's, seven operations a
number of its state, T / 2 keys, no router and no convolution. Source: `num_floating_point_operations` of
megatron/training/training.py (Megatron-LM, August 2026).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
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
    from amfm.model.loss import head_shapes

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


def megatron_flops_per_token(config: ModelConfig, sequence_length: int) -> float | None:
    """Training FLOPs of one token in a row of `sequence_length`; None for blocks that its formula does not have."""
    symbols = [*config.letters, *(config.num_depths * config.parsed_pattern.depth_letters)]
    if set(symbols) - set("M*-E") or config.head is not None:
        return None
    forward = {
        "M": _mamba(config),
        "*": _attention(config, sequence_length),
        "-": _feed_forward(config),
        "E": _experts(config),
    }
    heads = (1 + config.num_depths) * 2.0 * config.hidden_size * config.vocab_size
    return 3.0 * (sum(forward[symbol] for symbol in symbols) + heads)


def _mamba(config: ModelConfig) -> float:
    mamba, width = config.mamba, config.hidden_size
    if mamba is None:
        return 0.0
    inner = 2 * width
    into = 2.0 * width * (2 * inner + 2 * mamba.num_groups * mamba.state_size + mamba.num_heads)
    return into + 7.0 * inner * mamba.state_size + 2.0 * inner * width


def _attention(config: ModelConfig, sequence_length: int) -> float:
    attention, width = config.attention, config.hidden_size
    if attention is None:
        return 0.0
    share = attention.num_heads * attention.head_dim / width
    keys = width * attention.num_kv_heads / attention.num_heads
    return 4.0 * width * share * (width + keys + sequence_length / 2)


def _feed_forward(config: ModelConfig) -> float:
    dense = config.feed_forward
    return 0.0 if dense is None else _matrices(dense.activation) * config.hidden_size * dense.hidden_size


def _experts(config: ModelConfig) -> float:
    moe, width = config.moe, config.hidden_size
    if moe is None:
        return 0.0
    matrices, narrow = _matrices(moe.activation), moe.latent_size or width
    latent = 4.0 * width * narrow if moe.latent_size else 0.0
    shared = matrices * width * (moe.shared_expert_hidden_size or 0)
    return matrices * narrow * moe.expert_hidden_size * moe.top_k + latent + shared


def _matrices(activation: str) -> float:
    """FLOPs of a feed-forward by width and inner width: two matrices, or three of a gated one."""
    return 6.0 if activation.startswith("swiglu") else 4.0


def mean_auxiliary(config: ModelConfig, auxiliary: Mapping[str, float], num_blocks: int) -> dict[str, float]:
    """Balance losses as Megatron-LM logs them: means over `num_blocks` blocks with experts, without their weights."""
    moe = config.moe
    if moe is None or not num_blocks or len(config.expert_sections()) > 1:
        return {}
    weights = {
        "balance": moe.auxiliary_loss_weight,
        "sequence_balance": moe.sequence_loss_weight,
        "router_z": moe.z_loss_weight,
    }
    return {
        name: auxiliary[name] / weight / num_blocks for name, weight in weights.items() if weight and name in auxiliary
    }
