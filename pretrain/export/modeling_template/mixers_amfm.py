"""Registered mixers of an amfm hybrid model by name: windowed attention, mixture of memories, linear ones.

Sizes: B rows, T tokens, D model, H heads, J key-value heads, K head size (or memories of a token), S slots of keys, M
memories.

A mixer maps x [B, T, D] to y [B, T, D] and returns the state with which the next tokens continue. `mask_BT` is 0 at
padding, which must change no state. Keys without a token (padding, slots before the first) are masked in attention.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention_amfm import attend, attend_chosen, attend_eagerly, gate_heads, gate_size, norm_heads
from .blocks_amfm import DepthwiseConv, RMSNorm
from .cache_amfm import empty_rows
from .delta_mixers_amfm import DeltaNet, GatedDeltaNet, Kda
from .documents_amfm import Stretch
from .indexer_amfm import Indexer
from .linear_mixers_amfm import Hgrn2, State
from .package_mixers_amfm import PACKAGE_HEADS, PACKAGE_MIXERS
from .rotary_amfm import factor_on_scores, rotate, rotation, yarn_rope

LETTERS = {
    "C": "short_conv",
    "G": "gated_deltanet",
    "H": "hgrn2",
    "K": "kda",
    "L": "lightning",
    "P": "deltaproduct",
    "W": "window",
    "+": "mla",
}


class Window(nn.Module):
    """Attention to the last `window` tokens; the state is keys, values and which slots hold a token."""

    def __init__(self, options: dict[str, Any], config: Any) -> None:
        super().__init__()
        self.options, self.size, self.heads = options, options["head_dim"], options["num_heads"]
        self.kv_heads, self.kept = options["num_kv_heads"] or self.heads, options["window"] - 1
        width = (self.heads + 2 * self.kv_heads) * self.size
        # Exports of earlier versions have no bias, gate, sinks and scale.
        self.scale = options.get("softmax_scale") or self.size**-0.5
        has_bias = options.get("bias", False)
        self.in_proj = nn.Linear(config.hidden_size, width, bias=bool(has_bias))
        self.out_proj = nn.Linear(self.heads * self.size, config.hidden_size, bias=has_bias is True)
        self.gate = options.get("gate", "none")
        if self.gate != "none":
            self.g_proj = nn.Linear(config.hidden_size, self.heads * gate_size(self.gate, self.size), bias=False)
        self.sinks = nn.Parameter(torch.zeros(self.heads)) if options.get("sinks", False) else None
        self.num_key_value_groups = self.heads // self.kv_heads
        if options["qk_norm"]:
            is_wide = options["qk_norm"] == "wide"
            self.q_norm = RMSNorm(self.size * (self.heads if is_wide else 1), config.norm_epsilon)
            self.k_norm = RMSNorm(self.size * (self.kv_heads if is_wide else 1), config.norm_epsilon)

    def forward(
        self, x_BTD: Tensor, mask_BT: Tensor | None, positions_BT: Tensor, state: State | None
    ) -> tuple[Tensor, State]:
        """x [B, T, D] -> y [B, T, D] and the state after it."""
        rows, tokens, _ = x_BTD.shape
        q, k, v = self._project(x_BTD, positions_BT)
        is_text_BT = x_BTD.new_ones(rows, tokens, dtype=torch.bool) if mask_BT is None else mask_BT.bool()
        if state is None:
            empty = k.new_zeros(rows, self.kept, self.kv_heads, self.size)
            state = empty, empty, is_text_BT.new_zeros(rows, self.kept)
        k, v, is_text_BS = (torch.cat(pair, dim=1) for pair in zip(state, (k, v, is_text_BT)))
        # Query t stands in slot t + kept; a padded one sees itself, so that its softmax has something to sum.
        slots = torch.arange(k.shape[1], device=k.device)
        behind_TS = slots[self.kept :, None] - slots[None, :]
        is_near_TS = (behind_TS >= 0) & (behind_TS <= self.kept)
        allowed = (is_near_TS & is_text_BS[:, None, None, :]) | (behind_TS == 0)
        o_BTHK = self._attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), allowed)
        first = k.shape[1] - self.kept
        if self.gate != "none":
            o_BTHK = gate_heads(o_BTHK, self.g_proj(x_BTD))
        return self.out_proj(o_BTHK.flatten(2)), (k[:, first:], v[:, first:], is_text_BS[:, first:])

    def _attend(self, q_BHTK: Tensor, k_BJSK: Tensor, v_BJSK: Tensor, allowed: Tensor) -> Tensor:
        """Attend [B, T, H, K] to the keys that a mask allows; key heads are repeated for the query heads that share them."""
        if self.sinks is not None:
            mask = torch.zeros_like(allowed, dtype=torch.float32).masked_fill(~allowed, -torch.inf)
            return attend_eagerly(self, q_BHTK, k_BJSK, v_BJSK, mask, self.scale)[0]
        k_BHSK, v_BHSK = (x.repeat_interleave(self.num_key_value_groups, dim=1) for x in (k_BJSK, v_BJSK))
        return F.scaled_dot_product_attention(q_BHTK, k_BHSK, v_BHSK, attn_mask=allowed, scale=self.scale).transpose(
            1, 2
        )

    def _project(self, x_BTD: Tensor, positions_BT: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute queries [B, T, H, K], keys and values [B, T, J, K], normed and rotated as the options say."""
        queries, keys = self.heads * self.size, self.kv_heads * self.size
        parts = self.in_proj(x_BTD).split([queries, keys, keys], dim=-1)
        q, k, v = (part.unflatten(-1, (-1, self.size)) for part in parts)
        if self.options["qk_norm"]:
            q, k = norm_heads(self.q_norm, q), norm_heads(self.k_norm, k)
        if self.options["positions"] == "rope":
            # Exports of earlier versions have no yarn.
            rope = yarn_rope(self.options["rope_theta"], self.options.get("yarn"))
            cos, sin = rotation(rope, self.size, positions_BT)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        return q, k, v


class Mla(nn.Module):
    """Attention whose keys and values come from one narrow vector a token (DeepSeek-AI 2024, arXiv 2405.04434).

    The state is these vectors, each with the key that all heads share, and the keys of its indexer.
    """

    is_causal, num_key_value_groups = True, 1

    def __init__(self, options: dict[str, Any], config: Any) -> None:
        super().__init__()
        self.config = config
        self.options, self.heads, self.latent = options, options["num_heads"], options["latent_size"]
        self.plain, self.turned, self.value = (options[f"{part}_head_dim"] for part in ("nope", "rope", "value"))
        width, queries, epsilon = config.hidden_size, options["query_latent_size"], options["latent_norm_epsilon"]
        self.kv_down = nn.Linear(width, self.latent + self.turned, bias=False)
        self.kv_norm = RMSNorm(self.latent, epsilon)
        self.kv_up = nn.Linear(self.latent, self.heads * (self.plain + self.value), bias=False)
        self.q_down = nn.Linear(width, queries, bias=False) if queries else None
        self.q_norm = RMSNorm(queries, epsilon) if queries else None
        self.q_proj = nn.Linear(queries or width, self.heads * (self.plain + self.turned), bias=False)
        self.gate = options["gate"]
        if self.gate != "none":
            self.g_proj = nn.Linear(width, self.heads * gate_size(self.gate, self.value), bias=False)
        self.sinks = nn.Parameter(torch.zeros(self.heads)) if options.get("sinks", False) else None
        self.out_proj = nn.Linear(self.heads * self.value, width, bias=False)
        # Exports of earlier versions have no yarn.
        yarn = options.get("yarn")
        self.rope = yarn_rope(options["rope_theta"], yarn) if options["positions"] == "rope" else None
        self.scale = (self.plain + self.turned) ** -0.5 * factor_on_scores(yarn)
        self.indexer = Indexer(options["indexer"], width, queries or width) if options.get("indexer") else None

    def forward(self, x_BTD: Tensor, stretch: Stretch, state: State | None) -> tuple[Tensor, State]:
        """x [B, T, D] -> y [B, T, D] and the state after it."""
        query_BTX = x_BTD if self.q_down is None or self.q_norm is None else self.q_norm(self.q_down(x_BTD))
        q = self.q_proj(query_BTX).unflatten(-1, (self.heads, -1))
        c, key = self.kv_down(x_BTD).split([self.latent, self.turned], dim=-1)
        c = self.kv_norm(c)
        if self.rope is not None:
            cos, sin = rotation(self.rope, self.turned, stretch.positions_BT)
            key = rotate(key[:, :, None], cos, sin)[:, :, 0]
            q = torch.cat([q[..., : self.plain], rotate(q[..., self.plain :], cos, sin)], dim=-1)
        # The state keeps the rotated shared key: its position is its own, whenever it is read.
        latents = torch.cat([c, key], dim=-1)
        if state is not None:
            latents = torch.cat([state[0], latents], dim=1)
        c, key = latents.split([self.latent, self.turned], dim=-1)
        k, v = self.kv_up(c).unflatten(-1, (self.heads, -1)).split([self.plain, self.value], dim=-1)
        k = torch.cat([k, key[:, :, None].expand(-1, -1, self.heads, -1)], dim=-1)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        following: tuple[Tensor, ...] = (latents,)
        if self.indexer is not None and self.indexer.is_sparse:
            known = None if state is None else state[1]
            seen_BTS, index_k_BSC = self.indexer.choose(x_BTD, query_BTX, stretch, self.rope, known)
            o, following = attend_chosen(q, k, v, seen_BTS, self.scale), (latents, index_k_BSC)
        else:
            o = attend(self, q, k, v, stretch.attention_mask, self.scale)
        if self.gate != "none":
            o = gate_heads(o, self.g_proj(x_BTD))
        return self.out_proj(o.flatten(2)), following


class ShortConv(nn.Module):
    """Two gates around a short causal convolution (Liquid AI 2025, arXiv 2511.23404); the state is its last inputs."""

    def __init__(self, options: dict[str, Any], config: Any) -> None:
        super().__init__()
        self.width, kernel = config.hidden_size, options["conv_kernel"]
        self.in_proj = nn.Linear(self.width, 3 * self.width, bias=False)
        self.conv = DepthwiseConv(self.width, kernel, has_bias=False, has_silu=False)
        self.out_proj = nn.Linear(self.width, self.width, bias=False)
        self.kept = kernel - 1

    def forward(
        self, x_BTD: Tensor, mask_BT: Tensor | None, positions_BT: Tensor, state: State | None
    ) -> tuple[Tensor, State]:
        """x [B, T, D] -> y [B, T, D] and the state after it."""
        entry, exit_, values = self.in_proj(x_BTD).split(self.width, dim=-1)
        inputs = entry * values
        if mask_BT is not None:
            inputs = inputs * mask_BT[:, :, None].to(inputs.dtype)
        (window,) = state or (empty_rows(inputs, len(inputs), self.kept, self.width),)
        mixed, window = self.conv(inputs, window)
        return self.out_proj(exit_ * mixed), (window,)


# Built only from options and configuration: softmax over keys, or no recurrence.
OTHER_MIXERS: dict[str, type[nn.Module]] = {
    "window": Window,
    "mla": Mla,
    "short_conv": ShortConv,
}
LINEAR_MIXERS: dict[str, type[nn.Module]] = {
    "deltanet": DeltaNet,
    "gated_deltanet": GatedDeltaNet,
    "deltaproduct": GatedDeltaNet,
    "hgrn2": Hgrn2,
    "kda": Kda,
}


def build_mixer(symbol: str, config: Any, order: int, count: int) -> nn.Module:
    """Build the mixer of a letter or `{name}`; it is number `order` of `count` blocks that mix over the sequence.

    Some mixers have decays that depend on the depth, 0 at the first of these blocks and almost 1 at the last.
    """
    name = LETTERS.get(symbol, symbol.strip("{}"))
    options = config.mixers[name]
    if name in OTHER_MIXERS:
        return OTHER_MIXERS[name](options, config)
    depth = order / (count - 1 + 1e-5)
    kind = (LINEAR_MIXERS | PACKAGE_MIXERS)[name]
    if getattr(kind, "wraps_mixer", False):
        return kind(options, build_mixer(f"{{{options['mixer']}}}", config, order, count), config)
    return kind(options, config, depth)


def build_head(config: Any) -> nn.Module:
    """The matrix from the stream to logits, or a package's head."""
    head = PACKAGE_HEADS.get(getattr(config, "head", None) or "")
    return head(config) if head else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
