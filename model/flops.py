"""Parameter and FLOP counts of a model, from its configuration alone: nothing is allocated.

Kinds: `mamba`, `attention`, `moe`, `feed_forward`, registered mixers by name, `embedding`, `head`, `final_norm`, and `mtp` for
all of multi-token prediction; a block's norm counts with the block. The four kinds with a section of their own are counted in closed form, so that a launcher can
show sizes without importing torch. A registered mixer is counted by building one on the meta device, so that a plugin need
not repeat its own shapes in a formula; torch is imported only then.

FLOPs are those of the model and not of the program that computes it: recomputed activations, the chunked form of a scan
and padding do not count. A utilisation computed from them can therefore be compared between kernels and settings.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

from amfm.model.config.pattern import SECTIONS, block_kind
from amfm.model.config.schema import AttentionConfig, FeedForwardConfig, Mamba2Config, ModelConfig, MoeConfig
from amfm.model.config.structure import DENSE, Structure

_T = TypeVar("_T")


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
    for letter, number in config.parsed_pattern.counts().items():
        whole, used = block_parameters(config, letter)
        total[block_kind(letter)] = number * whole
        active[block_kind(letter)] = number * used
    for counts in (total, active):
        counts["final_norm"] = config.hidden_size
        counts["head"] = 0 if config.tie_embeddings else config.vocab_size * config.hidden_size
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
    for letter, number in config.parsed_pattern.counts().items():
        flops[block_kind(letter)] = number * block_flops(config, letter, sequence_length)
    if config.num_depths:
        flops["mtp"] = depth_flops(config, sequence_length)
    return flops


def depth_flops(config: ModelConfig, sequence_length: int) -> float:
    """Training FLOPs of one token in all depths of multi-token prediction: their projections, blocks and heads."""
    letters = config.parsed_pattern.depth_letters
    blocks = sum(block_flops(config, letter, sequence_length) for letter in letters)
    return config.num_depths * (blocks + depth_projection_flops(config) + head_flops(config))


def depth_projection_flops(config: ModelConfig) -> float:
    """Training FLOPs of one token in the projection [D, 2 D] of one depth."""
    return 6.0 * 2 * config.hidden_size**2


def block_flops(config: ModelConfig, letter: str, sequence_length: int) -> float:
    """Training FLOPs of one token in one block, counted as in `flops_per_token`.

    Backward has two products for each one of forward (for the input and for the weight), hence three times.
    """
    return 3.0 * (_block_forward_flops(config, letter, sequence_length) + 2.0 * _routed_updates(config, letter))


def head_flops(config: ModelConfig) -> float:
    """Training FLOPs of one token in the head, counted as in `flops_per_token`."""
    return 6.0 * config.vocab_size * config.hidden_size


def _depth_parameters(config: ModelConfig) -> tuple[int, int]:
    """(total, active) parameters of all modules of multi-token prediction: projection, three norms, and blocks."""
    own = 2 * config.hidden_size**2 + 3 * config.hidden_size
    blocks = [block_parameters(config, letter) for letter in config.parsed_pattern.depth_letters]
    total, active = (own + sum(counts) for counts in zip(*blocks))
    return config.num_depth_modules * total, config.num_depth_modules * active


def block_parameters(config: ModelConfig, letter: str) -> tuple[int, int]:
    """(total, active) parameters of one block with its norm."""
    rest = config.hidden_size + _routed_updates(config, letter)
    if letter not in SECTIONS:
        total = _registered(config, letter, 1)[0] + rest
        return total, total
    matrices, active_matrices = _block_matrices(config, letter)
    if letter == "M":
        mamba = _section(config.mamba)
        # Convolution; A_log, D and dt_bias, one number a head each; the weight of the gated norm.
        rest += mamba.conv_channels() * (mamba.conv_kernel + mamba.conv_bias) + 3 * mamba.num_heads + mamba.inner_size()
    elif letter == "*":
        attention = _section(config.attention)
        rest += 2 * attention.head_dim * attention.qk_norm
    return matrices + rest, active_matrices + rest


def _block_matrices(config: ModelConfig, letter: str) -> tuple[int, int]:
    """(total, active) weights of one block that tokens are multiplied by."""
    if letter == "M":
        weights = _mamba_matrices(_section(config.mamba), config.hidden_size)
    elif letter == "*":
        weights = _attention_matrices(_section(config.attention), config.hidden_size)
    elif letter == "-":
        dense = _section(config.feed_forward)
        weights = _feed_forward_matrices(dense, config.hidden_size, is_guided=config.guide is not None)
    else:
        return _moe_matrices(_section(config.moe), config.hidden_size, is_guided=config.guide is not None)
    return weights, weights


def _mamba_matrices(mamba: Mamba2Config, hidden_size: int) -> int:
    """Weights of in_proj and out_proj."""
    # z; then x, B and C, which are the channels of the convolution; then dt.
    in_rows = mamba.inner_size() + mamba.conv_channels() + mamba.num_heads
    return hidden_size * (in_rows + mamba.inner_size())


def _attention_matrices(attention: AttentionConfig, hidden_size: int) -> int:
    gates = {"none": 0, "head": attention.num_heads, "element": attention.num_heads * attention.head_dim}
    projections = 2 * attention.head_dim * (attention.num_heads + attention.num_kv_heads)
    return hidden_size * (projections + gates[attention.gate])


def _feed_forward_matrices(feed_forward: FeedForwardConfig, hidden_size: int, *, is_guided: bool) -> int:
    return feed_forward_weights(
        hidden_size,
        feed_forward.hidden_size,
        feed_forward.activation,
        feed_forward.structure(),
        is_guided=is_guided,
    )


def feed_forward_weights(width: int, inner: int, activation: str, structure: Structure, *, is_guided: bool) -> int:
    """Weights of a feed-forward of `inner` channels on a stream of `width`; guided factors have the dense matrices too."""
    up = (_matrices_a_unit(activation) - 1) * inner
    dense = width * (up + inner) if is_guided and structure != DENSE else 0
    return structure.weights(width, up) + structure.weights(inner, width) + dense


def _moe_matrices(moe: MoeConfig, hidden_size: int, *, is_guided: bool) -> tuple[int, int]:
    """(total, active) weights: router, shared expert and latent projections count for every token, experts top_k times."""
    units = _matrices_a_unit(moe.activation)
    routed_width = moe.latent_size or hidden_size
    expert = units * routed_width * moe.expert_hidden_size
    every_token = hidden_size * (moe.num_experts + moe.shared_expert_gate)
    if moe.shared_expert_hidden_size:
        shared = moe.shared_expert_hidden_size
        structure = moe.shared_structure()
        every_token += feed_forward_weights(hidden_size, shared, moe.activation, structure, is_guided=is_guided)
    if moe.latent_size is not None:
        every_token += 2 * hidden_size * moe.latent_size
    return every_token + moe.num_experts * expert, every_token + moe.top_k * expert


def _matrices_a_unit(activation: str) -> int:
    """Matrices of a feed-forward: gate, up and down for SwiGLU, up and down for squared ReLU."""
    return 3 if activation == "swiglu" else 2


def _block_forward_flops(config: ModelConfig, letter: str, sequence_length: int) -> float:
    """Forward FLOPs of one token in one block: 2 a weight that it passes, then what mixes over the sequence."""
    if letter not in SECTIONS:
        return _registered(config, letter, sequence_length)[1]
    flops = 2.0 * _block_matrices(config, letter)[1]
    if letter == "M":
        mamba = _section(config.mamba)
        flops += 2 * mamba.conv_kernel * mamba.conv_channels()
        # A state number a token: decay, times B, add, times C, add; then D x on each channel.
        flops += 5 * mamba.inner_size() * mamba.state_size + 2 * mamba.inner_size()
    elif letter == "*":
        attention = _section(config.attention)
        keys = (sequence_length + 1) / 2
        # Two products, queries with keys and weights with values, of 2 operations a channel and key each.
        flops += 2 * 2 * keys * attention.num_heads * attention.head_dim
    return flops


@lru_cache(maxsize=256)
def _routed_updates(config: ModelConfig, letter: str) -> int:
    """Parameters of a block's router and low-rank updates, which all tokens are multiplied by."""
    if config.lora_mixer is None:
        return 0
    from amfm.model.routed_updates import update_shapes

    return sum(math.prod(shape) for shape in update_shapes(config, letter).values())


@lru_cache(maxsize=256)
def _registered(config: ModelConfig, letter: str, sequence_length: int) -> tuple[int, float]:
    """(parameters, forward operations a token) of a registered mixer, counted on one that is built."""
    import torch

    from amfm.model.build import build_mixer
    from amfm.model.mixers.interface import SequenceMixer
    from amfm.model.parallel.groups import single_rank_groups

    with torch.device("meta"):
        mixer = build_mixer(config.built_letters.index(letter), config, single_rank_groups(), "torch")
    assert isinstance(mixer, SequenceMixer), f"{letter} is no registered mixer"
    parameters = list(mixer.parameters())
    # A matrix counts 2 a weight, and so do the taps of a convolution.
    matrices = sum(parameter.numel() for parameter in parameters if parameter.dim() > 1)
    total = sum(parameter.numel() for parameter in parameters)
    return total, 2.0 * matrices + mixer.sequence_flops(sequence_length)


def _section(section: _T | None) -> _T:
    assert section is not None, "check_model was not called: a section of the pattern is missing"
    return section
