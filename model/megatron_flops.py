"""FLOPs of a token by Megatron-LM's formula, so that its TFLOP/s per GPU and ours can be compared.

What differs from `flops.py` is in docs/metrics.md: an inner width of Mamba2 of twice the residual stream's, seven operations a
number of its state, T / 2 keys, no router and no convolution. Source: `num_floating_point_operations` of
megatron/training/training.py (Megatron-LM, August 2026).
"""

from __future__ import annotations

from collections.abc import Mapping

from amfm.model.config.schema import ModelConfig


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
