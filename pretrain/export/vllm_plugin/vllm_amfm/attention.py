"""Attention, attention to a window, and latent attention, on vLLM's attention with its cache of keys and values.

Sizes: N tokens of all requests, D model, H query heads and J key heads of this tensor rank, K head size, V value size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)

from .rotary import rotary_positions
from .served import attention_sizes


class GroupedAttention(nn.Module):
    """`*` and `W`: grouped queries with optional norms of heads, rotary positions, output gate and window."""

    def __init__(self, name: str, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        options = config.attention if name == "attention" else config.mixers["window"]
        heads, kv_heads, self.head_dim = attention_sizes(vars(config), name)
        ranks = get_tensor_model_parallel_world_size()
        self.heads, self.kv_heads = heads // ranks, max(1, kv_heads // ranks)
        width = config.hidden_size
        self.qkv_proj = QKVParallelLinear(
            width,
            self.head_dim,
            heads,
            kv_heads,
            bias=False,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.qkv_proj",
        )
        self.o_proj = RowParallelLinear(
            heads * self.head_dim, width, bias=False, quant_config=vllm_config.quant_config, prefix=f"{prefix}.o_proj"
        )
        self.g_proj = gate_projection(options.get("gate", "none"), width, heads, self.head_dim, f"{prefix}.g_proj")
        self.q_norm = self.k_norm = None
        if options["qk_norm"]:
            self.q_norm = RMSNorm(self.head_dim, eps=config.norm_epsilon)
            self.k_norm = RMSNorm(self.head_dim, eps=config.norm_epsilon)
        rope = options.get("rope") or {"theta": options.get("rope_theta"), "fraction": 1.0, "scaling": "none"}
        self.rotary = None
        if options["positions"] == "rope":
            self.rotary = rotary_positions(rope, self.head_dim, vllm_config)
        self.attn = Attention(
            self.heads,
            self.head_dim,
            options.get("softmax_scale") or self.head_dim**-0.5,
            num_kv_heads=self.kv_heads,
            cache_config=vllm_config.cache_config,
            quant_config=vllm_config.quant_config,
            per_layer_sliding_window=options["window"] if name == "window" else None,
            prefix=f"{prefix}.attn",
        )

    def forward(self, positions_N: Tensor, x_ND: Tensor) -> Tensor:
        """x [N, D] -> y [N, D]."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        q, k, v = self.qkv_proj(x_ND)[0].split([queries, keys, keys], dim=-1)
        if self.q_norm is not None and self.k_norm is not None:
            q = self.q_norm(q.reshape(-1, self.head_dim)).view(q.shape)
            k = self.k_norm(k.reshape(-1, self.head_dim)).view(k.shape)
        if self.rotary is not None:
            q, k = self.rotary(positions_N, q.contiguous(), k.contiguous())
        o_NX = self.attn(q, k, v)
        if self.g_proj is not None:
            o_NX = gate_heads(o_NX, self.g_proj(x_ND)[0], self.heads)
        return self.o_proj(o_NX)[0]


class LatentAttention(nn.Module):
    """`+`: keys and values come from one narrow vector a token.

    They are cached as all heads read them, since vLLM's caches of latents have no kernel for sizes such as these on a CPU; values
    are padded to the width of keys.
    """

    def __init__(self, name: str, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        options = config.mixers[name]
        heads, _, self.size = attention_sizes(vars(config), name)
        self.plain, self.turned, self.value = (options[f"{part}_head_dim"] for part in ("nope", "rope", "value"))
        self.latent, self.heads = options["latent_size"], heads // get_tensor_model_parallel_world_size()
        width, queries, epsilon = config.hidden_size, options["query_latent_size"], options["latent_norm_epsilon"]
        self.kv_down = ReplicatedLinear(width, self.latent + self.turned, bias=False, prefix=f"{prefix}.kv_down")
        self.kv_norm = RMSNorm(self.latent, eps=epsilon)
        self.kv_up = ColumnParallelLinear(
            self.latent, heads * (self.plain + self.value), bias=False, prefix=f"{prefix}.kv_up"
        )
        self.q_down = self.q_norm = None
        if queries:
            self.q_down = ReplicatedLinear(width, queries, bias=False, prefix=f"{prefix}.q_down")
            self.q_norm = RMSNorm(queries, eps=epsilon)
        self.q_proj = ColumnParallelLinear(queries or width, heads * self.size, bias=False, prefix=f"{prefix}.q_proj")
        self.g_proj = gate_projection(options["gate"], width, heads, self.value, f"{prefix}.g_proj")
        self.rotary = None
        if options["positions"] == "rope":
            rope = {"theta": options["rope_theta"], "fraction": 1.0, "scaling": "none"}
            self.rotary = rotary_positions(rope, self.turned, vllm_config)
        self.out_proj = RowParallelLinear(heads * self.value, width, bias=False, prefix=f"{prefix}.out_proj")
        self.attn = Attention(
            self.heads,
            self.size,
            self.size**-0.5,
            num_kv_heads=self.heads,
            cache_config=vllm_config.cache_config,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.attn",
        )

    def forward(self, positions_N: Tensor, x_ND: Tensor) -> Tensor:
        """x [N, D] -> y [N, D]."""
        q_ND = x_ND
        if self.q_down is not None and self.q_norm is not None:
            q_ND = self.q_norm(self.q_down(x_ND)[0].contiguous())
        q_NHK = self.q_proj(q_ND)[0].unflatten(-1, (self.heads, self.size))
        c, key = self.kv_down(x_ND)[0].split([self.latent, self.turned], dim=-1)
        kv_NHX = self.kv_up(self.kv_norm(c.contiguous()))[0].unflatten(-1, (self.heads, -1))
        k_NHK, v_NHV = kv_NHX.split([self.plain, self.value], dim=-1)
        if self.rotary is not None:
            turned, key = self.rotary(positions_N, q_NHK[..., self.plain :].flatten(1), key.contiguous())
            q_NHK = torch.cat([q_NHK[..., : self.plain], turned.unflatten(-1, (self.heads, -1))], dim=-1)
        k_NHK = torch.cat([k_NHK, key[:, None].expand(-1, self.heads, -1)], dim=-1)
        v_NHK = F.pad(v_NHV, (0, self.size - self.value))
        o_NX = self.attn(q_NHK.flatten(1), k_NHK.flatten(1), v_NHK.flatten(1))
        o_NX = o_NX.unflatten(-1, (self.heads, self.size))[..., : self.value].flatten(1)
        if self.g_proj is not None:
            o_NX = gate_heads(o_NX, self.g_proj(x_ND)[0], self.heads)
        return self.out_proj(o_NX)[0]


def gate_projection(kind: str, width: int, heads: int, size: int, prefix: str) -> ColumnParallelLinear | None:
    """Projection of the gates: none, one per head (`head`), or one for each channel (`element`)."""
    if kind == "none":
        return None
    return ColumnParallelLinear(width, heads * (size if kind == "element" else 1), bias=False, prefix=prefix)


def gate_heads(o_NX: Tensor, gate_NX: Tensor, heads: int) -> Tensor:
    """Multiply outputs [N, H * V] by the sigmoid of gates [N, H * V] or [N, H]."""
    return (o_NX.unflatten(-1, (heads, -1)) * torch.sigmoid(gate_NX).unflatten(-1, (heads, -1))).flatten(-2)
