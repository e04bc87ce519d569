"""Blocks of an amfm hybrid model in plain torch: what each letter of the pattern computes.

Sizes: B rows, T tokens, D model, H heads, P head size, G groups, N state, C convolution channels, W its width, K head
size of attention, J key-value heads, E experts, R = B * T rows of tokens. F in attention: rotated pairs; L: a chunk; I:
inner width, H * P.

Written to be read and to match the training code, not for speed: decays, norms and routers compute in float32 whatever
the weights' dtype, because rounding there changes which experts are chosen and how long a state lasts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .cache_amfm import BlockState, empty_rows


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, computed in float32 (Zhang and Sennrich 2019, arXiv 1910.07467)."""

    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        """x [..., size] -> the same shape and dtype."""
        return rms_norm(x, self.weight, self.epsilon)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Compute x / sqrt(mean(x^2) + epsilon) * weight over the last dimension, in float32, returned in the dtype of x."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    return (wide * weight.float()).to(x.dtype)


class GroupedRMSNorm(RMSNorm):
    """The norm over the channels of each of several groups."""

    def __init__(self, size: int, num_groups: int, epsilon: float) -> None:
        super().__init__(size, epsilon)
        self.num_groups = num_groups

    def forward(self, x: Tensor) -> Tensor:
        """x [..., size] -> the same shape and dtype."""
        grouped = x.unflatten(-1, (self.num_groups, -1))
        return rms_norm(grouped, self.weight.view(self.num_groups, -1), self.epsilon).flatten(-2)


class DepthwiseConv(nn.Module):
    """Causal depthwise convolution [C, W] with an optional bias and SiLU."""

    def __init__(self, channels: int, width: int, has_bias: bool, has_silu: bool = True) -> None:
        super().__init__()
        self.has_silu = has_silu
        self.weight = nn.Parameter(torch.zeros(channels, width))
        self.bias = nn.Parameter(torch.zeros(channels)) if has_bias else None

    def forward(self, inputs_BTC: Tensor, window_BWC: Tensor) -> tuple[Tensor, Tensor]:
        """Convolve inputs [B, T, C] that follow a window of W - 1 earlier ones; also returns the next window."""
        seen_BSC = torch.cat([window_BWC, inputs_BTC], dim=1)
        y_BCT = F.conv1d(seen_BSC.transpose(1, 2), self.weight.unsqueeze(1), self.bias, groups=self.weight.shape[0])
        y_BTC = y_BCT.transpose(1, 2)
        return F.silu(y_BTC) if self.has_silu else y_BTC, seen_BSC[:, seen_BSC.shape[1] - window_BWC.shape[1] :]


class Mamba2(nn.Module):
    """Mamba2 (Dao and Gu 2024, arXiv 2405.21060): in_proj, convolution, scan in chunks, gated norm, out_proj."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        section = config.mamba
        self.num_heads, self.head_dim = section["num_heads"], section["head_dim"]
        self.num_groups, self.state_size = section["num_groups"], section["state_size"]
        self.chunk_size, self.width = section["chunk_size"], section["conv_kernel"]
        self.inner = self.num_heads * self.head_dim
        self.channels = self.inner + 2 * self.num_groups * self.state_size
        self.in_proj = nn.Linear(config.hidden_size, self.inner + self.channels + self.num_heads, bias=False)
        self.conv = DepthwiseConv(self.channels, self.width, section["conv_bias"])
        self.A_log = nn.Parameter(torch.zeros(self.num_heads, dtype=torch.float32))
        self.D = nn.Parameter(torch.ones(self.num_heads))
        self.dt_bias = nn.Parameter(torch.zeros(self.num_heads, dtype=torch.float32))
        # The gated norm is over the channels of each group, as in training.
        self.norm = GroupedRMSNorm(self.inner, self.num_groups, config.norm_epsilon)
        self.out_proj = nn.Linear(self.inner, config.hidden_size, bias=False)

    def forward(self, x_BTD: Tensor, mask_BT: Tensor | None, state: BlockState) -> tuple[Tensor, BlockState]:
        """x [B, T, D] -> y [B, T, D] and (window [B, W - 1, C], state [B, H, P, N]); masked tokens change no state."""
        rows, tokens, _ = x_BTD.shape
        if mask_BT is not None:
            x_BTD = x_BTD * mask_BT[:, :, None].to(x_BTD.dtype)
        z_BTI, inputs_BTC, dt_BTH = self.in_proj(x_BTD).split([self.inner, self.channels, self.num_heads], dim=-1)
        if state is None:
            window_BWC = empty_rows(inputs_BTC, rows, self.width - 1, self.channels)
            sizes = (self.num_heads, self.head_dim, self.state_size)
            state_BHPN = empty_rows(inputs_BTC, rows, *sizes, dtype=torch.float32)
        else:
            window_BWC, state_BHPN = state
        # Padding is zeroed before the convolution and again after it: window and bias give it a value.
        convolved_BTC, window_BWC = self.conv(inputs_BTC, window_BWC)
        if mask_BT is not None:
            convolved_BTC = convolved_BTC * mask_BT[:, :, None].to(convolved_BTC.dtype)
        groups = self.num_groups * self.state_size
        x_BTI, B_BTS, C_BTS = convolved_BTC.float().split([self.inner, groups, groups], dim=-1)
        dt_BTH = F.softplus(dt_BTH.float() + self.dt_bias.float())
        y_BTHP, state_BHPN = self._scan(
            x_BTI.view(rows, tokens, self.num_heads, self.head_dim),
            dt_BTH,
            B_BTS.view(rows, tokens, self.num_groups, self.state_size),
            C_BTS.view(rows, tokens, self.num_groups, self.state_size),
            state_BHPN,
        )
        y_BTI = self.norm(y_BTHP.reshape(rows, tokens, self.inner) * F.silu(z_BTI.float()))
        return self.out_proj(y_BTI.to(x_BTD.dtype)), (window_BWC, state_BHPN)

    def _scan(
        self, x_BTHP: Tensor, dt_BTH: Tensor, B_BTGN: Tensor, C_BTGN: Tensor, state_BHPN: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Compute h_t = exp(dt_t A) h_(t-1) + dt_t B_t x_t, y_t = C_t . h_t + D x_t, a chunk at a time.

        Inside a chunk as a masked product of C and B (the paper's section 6), between chunks through the state h.
        """
        repeat = self.num_heads // self.num_groups
        decay_BTH = dt_BTH * -torch.exp(self.A_log.float())
        outputs = []
        for start in range(0, x_BTHP.shape[1], self.chunk_size):
            part = slice(start, start + self.chunk_size)
            input_BLHP = x_BTHP[:, part] * dt_BTH[:, part, :, None]
            B_BLHN = B_BTGN[:, part].repeat_interleave(repeat, dim=2)
            C_BLHN = C_BTGN[:, part].repeat_interleave(repeat, dim=2)
            total_BHL = decay_BTH[:, part].cumsum(dim=1).transpose(1, 2)
            causal = torch.ones(total_BHL.shape[-1], total_BHL.shape[-1], dtype=torch.bool, device=x_BTHP.device).tril()
            between = (total_BHL[..., :, None] - total_BHL[..., None, :]).masked_fill(~causal, -math.inf).exp()
            # exp of a difference of sums is at most 1; a quotient of two exponentials would overflow.
            scores_BHLL = torch.einsum("blhn,bmhn->bhlm", C_BLHN, B_BLHN) * between
            y_BLHP = torch.einsum("bhlm,bmhp->blhp", scores_BHLL, input_BLHP)
            y_BLHP = y_BLHP + torch.einsum("blhn,bhpn,bhl->blhp", C_BLHN, state_BHPN, total_BHL.exp())
            to_end_BHL = (total_BHL[..., -1:] - total_BHL).exp()
            state_BHPN = state_BHPN * total_BHL[..., -1, None, None].exp()
            state_BHPN = state_BHPN + torch.einsum("bhl,blhn,blhp->bhpn", to_end_BHL, B_BLHN, input_BLHP)
            outputs.append(y_BLHP + self.D.float()[:, None] * x_BTHP[:, part])
        return torch.cat(outputs, dim=1), state_BHPN


class Attention(nn.Module):
    """Causal grouped-query attention (arXiv 2305.13245), with optional head norms, rotary positions and output gate."""

    is_causal = True

    def __init__(self, config: Any, index: int) -> None:
        super().__init__()
        section = config.attention
        self.config, self.layer_idx = config, index
        self.num_heads, self.num_kv_heads = section["num_heads"], section["num_kv_heads"]
        self.head_dim, self.num_key_value_groups = section["head_dim"], self.num_heads // self.num_kv_heads
        self.scale = section["softmax_scale"] or self.head_dim**-0.5
        self.rope = section["rope"] if section["positions"] == "rope" else None
        width = config.hidden_size
        self.q_proj = nn.Linear(width, self.num_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(width, self.num_kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(width, self.num_kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.num_heads * self.head_dim, width, bias=False)
        # Exports of earlier versions have no gate.
        self.gate = section.get("gate", "none")
        if self.gate != "none":
            self.g_proj = nn.Linear(width, self.num_heads * gate_size(self.gate, self.head_dim), bias=False)
        if section["qk_norm"]:
            self.q_norm = RMSNorm(self.head_dim, config.norm_epsilon)
            self.k_norm = RMSNorm(self.head_dim, config.norm_epsilon)
        self.qk_norm = section["qk_norm"]
        # Exports of earlier versions have no sinks.
        self.sinks = nn.Parameter(torch.zeros(self.num_heads)) if section.get("sinks", False) else None

    def forward(self, x_BTD: Tensor, mask: Any, positions_BT: Tensor, state: BlockState) -> tuple[Tensor, BlockState]:
        """x [B, T, D] -> y [B, T, D] and (keys, values) [B, J, S, K] of all S tokens so far; mask: as the backend takes it."""
        rows, tokens, _ = x_BTD.shape
        q_BTHK = self.q_proj(x_BTD).view(rows, tokens, self.num_heads, self.head_dim)
        k_BTJK = self.k_proj(x_BTD).view(rows, tokens, self.num_kv_heads, self.head_dim)
        v_BJTK = self.v_proj(x_BTD).view(rows, tokens, self.num_kv_heads, self.head_dim).transpose(1, 2)
        if self.qk_norm:
            q_BTHK, k_BTJK = self.q_norm(q_BTHK), self.k_norm(k_BTJK)
        if self.rope is not None:
            frequencies, factor = rope_frequencies(self.rope, self.head_dim)
            angles_BTF = positions_BT[..., None].float() * frequencies.to(x_BTD.device)
            cos, sin = angles_BTF.cos()[:, :, None] * factor, angles_BTF.sin()[:, :, None] * factor
            q_BTHK, k_BTJK = rotate(q_BTHK, cos, sin), rotate(k_BTJK, cos, sin)
        q_BHTK, k_BJTK = q_BTHK.transpose(1, 2), k_BTJK.transpose(1, 2)
        if state is not None:
            k_BJTK, v_BJTK = torch.cat([state[0], k_BJTK], dim=2), torch.cat([state[1], v_BJTK], dim=2)
        o_BTHK = attend(self, q_BHTK, k_BJTK, v_BJTK, mask, self.scale)
        if self.gate != "none":
            o_BTHK = gate_heads(o_BTHK, self.g_proj(x_BTD))
        return self.o_proj(o_BTHK.reshape(rows, tokens, -1)), (k_BJTK, v_BJTK)


def attend(module: Any, q_BHTK: Tensor, k_BJSK: Tensor, v_BJSV: Tensor, mask: Any, scale: float) -> Tensor:
    """Attention [B, T, H, V] by the backend that the model was loaded with; key heads may be fewer than query heads."""
    backend = ALL_ATTENTION_FUNCTIONS.get_interface(module.config._attn_implementation, attend_eagerly)
    o_BTHV, _ = backend(module, q_BHTK, k_BJSK, v_BJSV, mask, dropout=0.0, scaling=scale)
    return o_BTHV


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


def gate_size(kind: str, head_dim: int) -> int:
    """Number of gates per head: one for each channel (`element`), else one."""
    return head_dim if kind == "element" else 1


def gate_heads(o_BTHK: Tensor, gate_BTX: Tensor) -> Tensor:
    """Multiply outputs [B, T, H, K] by the sigmoid of gates [B, T, H * K] or [B, T, H]."""
    return o_BTHK * torch.sigmoid(gate_BTX).unflatten(-1, (o_BTHK.shape[2], -1))


def rope_frequencies(rope: dict[str, Any], head_dim: int) -> tuple[Tensor, float]:
    """Compute the radians a position of each rotated pair, and the factor on cosine and sine (YaRN, arXiv 2309.00071, section 3)."""
    size = int(head_dim * rope["fraction"])
    base, scaling = rope["theta"], rope["scaling"]
    if scaling == "ntk":
        base = base * rope["ntk_alpha"] ** (size / (size - 2))
    inverse = 1.0 / base ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
    if scaling == "llama3":
        stretch = rope["llama3"]
        turns = stretch["original_length"] * inverse / (2 * math.pi)
        kept = ((turns - stretch["slow_turns"]) / (stretch["fast_turns"] - stretch["slow_turns"])).clamp(0, 1)
        return inverse * kept + inverse / stretch["factor"] * (1 - kept), 1.0
    if scaling != "yarn":
        return inverse, 1.0

    def pair_of(rotations: float) -> float:
        length = rope["yarn_original_length"]
        return size * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(pair_of(rope["yarn_beta_fast"])), 0)
    high = min(math.ceil(pair_of(rope["yarn_beta_slow"])), size - 1)
    ramp = ((torch.arange(size // 2, dtype=torch.float32) - low) / (high - low or 1e-3)).clamp(0, 1)
    factor = rope["yarn_factor"]
    attention_factor = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
    return inverse / factor * ramp + inverse * (1 - ramp), attention_factor


def rotate(x_BTHK: Tensor, cos_BTF: Tensor, sin_BTF: Tensor) -> Tensor:
    """Rotate, in float32, the pairs (i, i + half) of the first 2 * F channels; the others stay."""
    half = cos_BTF.shape[-1]
    first, second, rest = x_BTHK.float().split([half, half, x_BTHK.shape[-1] - 2 * half], dim=-1)
    turned = torch.cat([first * cos_BTF - second * sin_BTF, second * cos_BTF + first * sin_BTF, rest], dim=-1)
    return turned.to(x_BTHK.dtype)


# Steepness of the gate's sigmoid, and what is added to up.
GATES = {"swiglu": (1.0, 0.0), "swiglu_oai": (1.702, 1.0)}


def activate(x: Tensor, activation: str, limit: float | None) -> Tensor:
    """Apply a gated unit to [gate, up] (the last dim halves; arXiv 2002.05202) or squared ReLU (arXiv 2109.08668)."""
    if activation not in GATES:
        return F.relu(x).square()
    gate, up = x.chunk(2, dim=-1)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    alpha, shift = GATES[activation]
    return F.silu(gate) * up if activation == "swiglu" else gate * torch.sigmoid(alpha * gate) * (up + shift)


class FeedForward(nn.Module):
    """Feed-forward block: down(activation(up(x)))."""

    def __init__(self, width: int, hidden: int, activation: str, limit: float | None) -> None:
        super().__init__()
        self.activation, self.limit = activation, limit
        self.up_proj = nn.Linear(width, hidden * (2 if activation in GATES else 1), bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D]."""
        return self.down_proj(activate(self.up_proj(x), self.activation, self.limit))


class Experts(nn.Module):
    """Stacked weights of the routed experts: up [E, F, D] (gate rows, then up rows), down [E, D, F]."""

    def __init__(self, section: dict[str, Any], width: int) -> None:
        super().__init__()
        hidden, experts = section["expert_hidden_size"], section["num_experts"]
        # Exports of earlier versions have no limit.
        self.activation, self.limit = section["activation"], section.get("activation_limit")
        self.up = nn.Parameter(torch.zeros(experts, hidden * (2 if self.activation in GATES else 1), width))
        self.down = nn.Parameter(torch.zeros(experts, width, hidden))

    def forward(self, x_RD: Tensor, ids_RK: Tensor, weights_RK: Tensor) -> Tensor:
        """Sum weight times expert(x) over the chosen experts of each token; only experts that were chosen compute."""
        y_RD = torch.zeros_like(x_RD)
        if torch.compiler.is_compiling():
            # A graph cannot depend on the choice: all experts compute, and weights of those not chosen are zero.
            for expert in range(self.up.shape[0]):
                out = self._run(x_RD, expert)
                weight_R = torch.where(ids_RK == expert, weights_RK, 0.0).sum(dim=-1, keepdim=True)
                y_RD = y_RD + (out * weight_R).to(x_RD.dtype)
            return y_RD
        for expert in ids_RK.unique().tolist():
            rows, choice = (ids_RK == expert).nonzero(as_tuple=True)
            out = self._run(x_RD[rows], expert)
            y_RD = y_RD.index_add(0, rows, (out * weights_RK[rows, choice, None]).to(x_RD.dtype))
        return y_RD

    def _run(self, x_RD: Tensor, expert: int) -> Tensor:
        """One expert's feed-forward of rows."""
        inner = activate(F.linear(x_RD, self.up[expert]), self.activation, self.limit)
        return F.linear(inner, self.down[expert])


class Router(nn.Linear):
    """Scores of experts, in float32 whatever the dtype of its weight."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., E]."""
        return F.linear(x.float(), self.weight.float())


def sqrt_softplus(logits_RE: Tensor) -> Tensor:
    """Square root of log(1 + e^x), which float32 knows down to -80."""
    return F.softplus(logits_RE.clamp(min=-80.0)).sqrt()


SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits_RE: logits_RE.softmax(dim=-1),
    "sigmoid": torch.sigmoid,
    "sqrt_softplus": sqrt_softplus,
}


class MixtureOfExperts(nn.Module):
    """Routed experts chosen by a linear router, an optional expert for every token, optional narrow experts."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        section, width = config.moe, config.hidden_size
        self.section = section
        self.router = Router(width, section["num_experts"], bias=False, dtype=torch.float32)
        self.expert_bias: Tensor
        if section["expert_bias"]:
            self.register_buffer("expert_bias", torch.zeros(section["num_experts"], dtype=torch.float32))
        latent = section["latent_size"]
        if latent is not None:
            self.latent_down = nn.Linear(width, latent, bias=False)
            self.latent_up = nn.Linear(latent, width, bias=False)
        self.experts = Experts(section, latent or width)
        if section["shared_expert_hidden_size"]:
            size, limit = section["shared_expert_hidden_size"], section.get("activation_limit")
            self.shared = FeedForward(width, size, section["activation"], limit)
        # Exports of earlier versions have no gate.
        self.has_gate = section.get("shared_expert_gate", False)
        if self.has_gate:
            self.shared_gate = nn.Linear(width, 1, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """x [B, T, D] -> y [B, T, D]."""
        x_RD = x_BTD.flatten(0, 1)
        ids_RK, weights_RK = self._route(self.router(x_RD))
        has_latent = self.section["latent_size"] is not None
        y_RD = self.experts(self.latent_down(x_RD) if has_latent else x_RD, ids_RK, weights_RK)
        if has_latent:
            y_RD = self.latent_up(y_RD)
        if self.section["shared_expert_hidden_size"]:
            shared_RD = self.shared(x_RD)
            y_RD = y_RD + (shared_RD * torch.sigmoid(self.shared_gate(x_RD)) if self.has_gate else shared_RD)
        return y_RD.view_as(x_BTD)

    def _route(self, logits_RE: Tensor) -> tuple[Tensor, Tensor]:
        """Choose experts from float32 logits [R, E]: ids and weights [R, choices].

        The bias steers the choice and never the weights (Wang et al. 2024, arXiv 2408.15664). With router groups, only the
        groups with the best scores in sum are eligible (DeepSeek-AI 2024, arXiv 2412.19437, section 2.1.2).
        """
        section = self.section
        scores_RE = SCORES[section["router"]](logits_RE)
        choice_RE = scores_RE + self.expert_bias.float() if section["expert_bias"] else scores_RE
        groups, kept = section["num_router_groups"], section["router_group_top_k"]
        if kept < groups:
            grouped = choice_RE.view(choice_RE.shape[0], groups, -1)
            merit = section.get("router_group_merit", 2)  # exports of before have none
            best = grouped.topk(merit, dim=-1).values.sum(dim=-1).topk(kept, dim=-1).indices
            is_kept = torch.zeros_like(grouped[..., 0], dtype=torch.bool).scatter(1, best, True)
            choice_RE = grouped.masked_fill(~is_kept[..., None], -math.inf).view_as(choice_RE)
        ids_RK = choice_RE.topk(section["top_k"], dim=-1).indices
        weights_RK = scores_RE.gather(1, ids_RK)
        if section["normalize_probabilities"]:
            weights_RK = weights_RK / weights_RK.sum(dim=-1, keepdim=True)
        return ids_RK, weights_RK * section["routed_scaling"]
