"""Rotary positions on vLLM's embeddings, from our section: the halves of the first `fraction` of a head are paired."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.rotary_embedding import YaRNScalingRotaryEmbedding, get_rope


def rotary_positions(rope: dict[str, Any], head_dim: int, vllm_config: VllmConfig) -> nn.Module:
    """Build the embedding of one attention, for as many tokens as a request may have."""
    model = vllm_config.model_config
    length = max(model.hf_config.max_position_embeddings, model.max_model_len)
    size, theta, kind = int(head_dim * rope["fraction"]), rope["theta"], rope["scaling"]
    if kind == "yarn":
        return Yarn(rope, head_dim, size, length)
    if kind == "ntk":
        # NTK-aware scaling is plain rotation with a larger base.
        theta = theta * rope["ntk_alpha"] ** (size / (size - 2))
    parameters: dict[str, Any] = {"rope_type": "default", "rope_theta": theta, "rope_dim": size}
    if kind == "llama3":
        stretch = rope["llama3"]
        parameters |= {
            "rope_type": "llama3",
            "factor": stretch["factor"],
            "low_freq_factor": stretch["slow_turns"],
            "high_freq_factor": stretch["fast_turns"],
            "original_max_position_embeddings": stretch["original_length"],
        }
    return get_rope(head_dim, length, rope_parameters=parameters)


class Yarn(YaRNScalingRotaryEmbedding):
    """YaRN whose table is as long as requests may be; vLLM's own ends at the stretched length, and tokens behind it are wrong."""

    def __init__(self, rope: dict[str, Any], head_dim: int, size: int, length: int) -> None:
        self.length = length
        super().__init__(
            head_dim,
            size,
            rope["yarn_original_length"],
            rope["theta"],
            True,
            rope["yarn_factor"],
            torch.get_default_dtype(),
            beta_fast=rope["yarn_beta_fast"],
            beta_slow=rope["yarn_beta_slow"],
        )

    def _compute_cos_sin_cache(self) -> Tensor:
        turns = torch.outer(torch.arange(self.length, dtype=torch.float32), self._compute_inv_freq(self.scaling_factor))
        return torch.cat([turns.cos(), turns.sin()], dim=-1) * self.mscale
