"""Attention of an amfm hybrid model in plain torch, and what windows and latent attention share with it: heads, gates, rotation.

Sizes: B rows, T tokens, S all tokens so far, D model, H heads, J key-value heads, K head size, V value size, F rotated pairs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .blocks_amfm import RMSNorm
from .cache_amfm import BlockState
from .documents_amfm import Stretch
from .indexer_amfm import Indexer
from .rotary_amfm import rotate, rotation


class Attention(nn.Module):
    """Causal grouped-query attention (arXiv 2305.13245), with optional norms, rotary positions, biases, gate and indexer."""

    is_causal = True

    def __init__(self, config: Any, index: int) -> None:
        super().__init__()
        section = config.attention
        self.config, self.layer_idx = config, index
        self.num_heads, self.num_kv_heads = section["num_heads"], section["num_kv_heads"]
        self.head_dim, self.num_key_value_groups = section["head_dim"], self.num_heads // self.num_kv_heads
        self.scale = section["softmax_scale"] or self.head_dim**-0.5
        self.rope = section["rope"] if section["positions"] == "rope" else None
        # Exports of earlier versions have no bias, gate, sinks and indexer.
        width, has_bias = config.hidden_size, section.get("bias", False)  # "qkv": the output has none
        self.q_proj = nn.Linear(width, self.num_heads * self.head_dim, bias=bool(has_bias))
        self.k_proj = nn.Linear(width, self.num_kv_heads * self.head_dim, bias=bool(has_bias))
        self.v_proj = nn.Linear(width, self.num_kv_heads * self.head_dim, bias=bool(has_bias))
        self.o_proj = nn.Linear(self.num_heads * self.head_dim, width, bias=has_bias is True)
        self.gate = section.get("gate", "none")
        if self.gate != "none":
            self.g_proj = nn.Linear(width, self.num_heads * gate_size(self.gate, self.head_dim), bias=False)
        if section["qk_norm"]:
            is_wide = section["qk_norm"] == "wide"
            self.q_norm = RMSNorm(self.head_dim * (self.num_heads if is_wide else 1), config.norm_epsilon)
            self.k_norm = RMSNorm(self.head_dim * (self.num_kv_heads if is_wide else 1), config.norm_epsilon)
        self.qk_norm = section["qk_norm"]
        self.sinks = nn.Parameter(torch.zeros(self.num_heads)) if section.get("sinks", False) else None
        self.indexer = Indexer(section["indexer"], width, width) if section.get("indexer") else None

    def forward(self, x_BTD: Tensor, stretch: Stretch, state: BlockState) -> tuple[Tensor, BlockState]:
        """x [B, T, D] -> y [B, T, D] and (keys, values) [B, J, S, K] of all S tokens so far; behind them keys of the indexer."""
        rows, tokens, _ = x_BTD.shape
        q_BTHK = self.q_proj(x_BTD).view(rows, tokens, self.num_heads, self.head_dim)
        k_BTJK = self.k_proj(x_BTD).view(rows, tokens, self.num_kv_heads, self.head_dim)
        v_BJTK = self.v_proj(x_BTD).view(rows, tokens, self.num_kv_heads, self.head_dim).transpose(1, 2)
        if self.qk_norm:
            q_BTHK, k_BTJK = norm_heads(self.q_norm, q_BTHK), norm_heads(self.k_norm, k_BTJK)
        if self.rope is not None:
            cos, sin = rotation(self.rope, self.head_dim, stretch.positions_BT)
            q_BTHK, k_BTJK = rotate(q_BTHK, cos, sin), rotate(k_BTJK, cos, sin)
        q_BHTK, k_BJTK = q_BTHK.transpose(1, 2), k_BTJK.transpose(1, 2)
        if state is not None:
            k_BJTK, v_BJTK = torch.cat([state[0], k_BJTK], dim=2), torch.cat([state[1], v_BJTK], dim=2)
        following: tuple[Tensor, ...] = (k_BJTK, v_BJTK)
        if self.indexer is not None and self.indexer.is_sparse:
            seen_BTS, index_k_BSC = self.indexer.choose(
                x_BTD, x_BTD, stretch, self.rope, None if state is None else state[2]
            )
            o_BTHK = attend_chosen(q_BHTK, k_BJTK, v_BJTK, seen_BTS, self.scale)
            following = (*following, index_k_BSC)
        else:
            o_BTHK = attend(self, q_BHTK, k_BJTK, v_BJTK, stretch.attention_mask, self.scale)
        if self.gate != "none":
            o_BTHK = gate_heads(o_BTHK, self.g_proj(x_BTD))
        return self.o_proj(o_BTHK.reshape(rows, tokens, -1)), following


def attend(module: Any, q_BHTK: Tensor, k_BJSK: Tensor, v_BJSV: Tensor, mask: Any, scale: float) -> Tensor:
    """Attention [B, T, H, V] by the backend that the model was loaded with; key heads may be fewer than query heads."""
    backend = ALL_ATTENTION_FUNCTIONS.get_interface(module.config._attn_implementation, attend_eagerly)
    o_BTHV, _ = backend(module, q_BHTK, k_BJSK, v_BJSV, mask, dropout=0.0, scaling=scale)
    return o_BTHV


def attend_chosen(q_BHTK: Tensor, k_BJSK: Tensor, v_BJSV: Tensor, allowed_BTS: Tensor, scale: float) -> Tensor:
    """Attention [B, T, H, V] to the keys that a mask allows, whatever the backend; key heads may be fewer than query heads."""
    repeats = q_BHTK.shape[1] // k_BJSK.shape[1]
    k_BHSK, v_BHSV = (part.repeat_interleave(repeats, dim=1) for part in (k_BJSK, v_BJSV))
    mask = allowed_BTS[:, None]
    return F.scaled_dot_product_attention(q_BHTK, k_BHSK, v_BHSV, attn_mask=mask, scale=scale).transpose(1, 2)


def attend_eagerly(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float, **_: Any
) -> tuple[Tensor, Tensor]:
    """Attention as products and a softmax in float32, with a mask that is added, and the module's sinks where it has them."""
    key, value = (part.repeat_interleave(module.num_key_value_groups, dim=1) for part in (key, value))
    scores = (query @ key.transpose(2, 3)).float() * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    if module.sinks is not None:
        # One more score per head, whose weight is dropped.
        sinks = module.sinks.float()[:, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks], dim=-1)
    weights = scores.softmax(dim=-1)[..., : key.shape[2]].to(value.dtype)
    return (weights @ value).transpose(1, 2), weights


def norm_heads(norm: RMSNorm, x_BTHK: Tensor) -> Tensor:
    """Norm each head [B, T, H, K], or all heads of a token together where the norm is as wide as they are."""
    return norm(x_BTHK) if norm.weight.numel() == x_BTHK.shape[3] else norm(x_BTHK.flatten(2)).view_as(x_BTHK)


def gate_size(kind: str, head_dim: int) -> int:
    """Number of gates per head: one for each channel (`element`), else one."""
    return head_dim if kind == "element" else 1


def gate_heads(o_BTHK: Tensor, gate_BTX: Tensor) -> Tensor:
    """Multiply outputs [B, T, H, K] by the sigmoid of gates [B, T, H * K] or [B, T, H]."""
    return o_BTHK * torch.sigmoid(gate_BTX).unflatten(-1, (o_BTHK.shape[2], -1))
