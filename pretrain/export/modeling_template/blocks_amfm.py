"""Blocks of an amfm hybrid model in plain torch: norms, Mamba2, feed-forward and experts.

Sizes: B rows, T tokens, D model, H heads, P head size, G groups, N state, C convolution channels, W its width, E experts, R =
B * T rows of tokens. L: a chunk; I: inner width, H * P.

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


def make_norm(config: Any) -> nn.Module:
    """Make a norm of the residual stream."""
    kind = nn.LayerNorm if config.norm_kind == "layernorm" else RMSNorm
    return kind(config.hidden_size, config.norm_epsilon)


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


# Steepness of the gate's sigmoid, and what is added to up.
GATES = {"swiglu": (1.0, 0.0), "swiglu_oai": (1.702, 1.0), "geglu": (1.0, 0.0), "geglu_erf": (1.0, 0.0)}
GELUS = {"geglu": "tanh", "geglu_erf": "none", "gelu": "none", "gelu_tanh": "tanh"}


def activate(x: Tensor, activation: str, limit: float | None) -> Tensor:
    """Apply a gated unit to [gate, up] (the last dim halves; arXiv 2002.05202), squared ReLU (arXiv 2109.08668) or GELU."""
    if activation not in GATES:
        return F.gelu(x, approximate=GELUS[activation]) if activation in GELUS else F.relu(x).square()
    gate, up = x.chunk(2, dim=-1)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    if activation in GELUS:
        return F.gelu(gate, approximate=GELUS[activation]) * up
    alpha, shift = GATES[activation]
    return F.silu(gate) * up if activation == "swiglu" else gate * torch.sigmoid(alpha * gate) * (up + shift)


class FeedForward(nn.Module):
    """Feed-forward block: down(activation(up(x)))."""

    def __init__(self, width: int, hidden: int, activation: str, limit: float | None, bias: bool = False) -> None:
        super().__init__()
        self.activation, self.limit = activation, limit
        self.up_proj = nn.Linear(width, hidden * (2 if activation in GATES else 1), bias=bias)
        self.down_proj = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D]."""
        return self.down_proj(activate(self.up_proj(x), self.activation, self.limit))


# Channels behind those of a token in the matrices of experts with biases.
BIAS_CHANNELS = 8


class Experts(nn.Module):
    """Stacked weights of the routed experts: up [E, F, D] (gate rows, then up rows), down [E, D, F].

    With biases D is BIAS_CHANNELS more: column -BIAS_CHANNELS of up is the bias; those after it, and rows of down, are zeros.
    """

    def __init__(self, section: dict[str, Any], width: int) -> None:
        super().__init__()
        hidden, experts = section["expert_hidden_size"], section["num_experts"]
        # Exports of earlier versions have no limit and no bias.
        self.activation, self.limit = section["activation"], section.get("activation_limit")
        self.width, self.has_bias = width, section.get("bias", False)
        rows = width + BIAS_CHANNELS * self.has_bias
        self.up = nn.Parameter(torch.zeros(experts, hidden * (2 if self.activation in GATES else 1), rows))
        self.down = nn.Parameter(torch.zeros(experts, rows, hidden))

    def forward(self, x_RD: Tensor, ids_RK: Tensor, weights_RK: Tensor, down_bias_ED: Tensor | None) -> Tensor:
        """Sum weight times expert(x) over the chosen experts of each token; only experts that were chosen compute."""
        y_RD = torch.zeros_like(x_RD)
        if torch.compiler.is_compiling():
            # A graph cannot depend on the choice: all experts compute, and weights of those not chosen are zero.
            for expert in range(self.up.shape[0]):
                out = self._run(x_RD, expert, down_bias_ED)
                weight_R = torch.where(ids_RK == expert, weights_RK, 0.0).sum(dim=-1, keepdim=True)
                y_RD = y_RD + (out * weight_R).to(x_RD.dtype)
            return y_RD
        for expert in ids_RK[ids_RK < self.up.shape[0]].unique().tolist():
            rows, choice = (ids_RK == expert).nonzero(as_tuple=True)
            out = self._run(x_RD[rows], expert, down_bias_ED)
            y_RD = y_RD.index_add(0, rows, (out * weights_RK[rows, choice, None]).to(x_RD.dtype))
        return y_RD

    def _run(self, x_RD: Tensor, expert: int, down_bias_ED: Tensor | None) -> Tensor:
        """One expert's feed-forward of rows."""
        up, down = self.up[expert, :, : self.width], self.down[expert, : self.width]
        up_bias = self.up[expert, :, self.width] if self.has_bias else None
        inner = activate(F.linear(x_RD, up, up_bias), self.activation, self.limit)
        return F.linear(inner, down, None if down_bias_ED is None else down_bias_ED[expert])


class Router(nn.Linear):
    """Scores of experts, in float32 whatever the dtype of its weight and bias."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., E]."""
        return F.linear(x.float(), self.weight.float(), None if self.bias is None else self.bias.float())


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
        has_bias = section.get("bias", False)
        self.router = Router(width, section["num_experts"], bias=has_bias, dtype=torch.float32)
        self.expert_bias: Tensor
        if section["expert_bias"]:
            self.register_buffer("expert_bias", torch.zeros(section["num_experts"], dtype=torch.float32))
        latent = section["latent_size"]
        if latent is not None:
            self.latent_down = nn.Linear(width, latent, bias=False)
            self.latent_up = nn.Linear(latent, width, bias=False)
        self.experts = Experts(section, latent or width)
        self.down_bias = nn.Parameter(torch.zeros(section["num_experts"], latent or width)) if has_bias else None
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
        y_RD = self.experts(self.latent_down(x_RD) if has_latent else x_RD, ids_RK, weights_RK, self.down_bias)
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
        # Here, for forms of packages import this file.
        from .package_mixers_amfm import PACKAGE_ROUTERS

        section = self.section
        if section["router"] in PACKAGE_ROUTERS:
            return PACKAGE_ROUTERS[section["router"]](logits_RE, section)
        scores_RE = SCORES[section["router"]](logits_RE)
        choice_RE = scores_RE + self.expert_bias.float() if section["expert_bias"] else scores_RE
        groups, kept = section["num_router_groups"], section["router_group_top_k"]
        if kept < groups:
            grouped = choice_RE.view(choice_RE.shape[0], groups, -1)
            merit = section.get(
                "group_score_top_k", section.get("router_group_merit", 2)
            )  # exports of before have none
            best = grouped.topk(merit, dim=-1).values.sum(dim=-1).topk(kept, dim=-1).indices
            is_kept = torch.zeros_like(grouped[..., 0], dtype=torch.bool).scatter(1, best, True)
            choice_RE = grouped.masked_fill(~is_kept[..., None], -math.inf).view_as(choice_RE)
        ids_RK = choice_RE.topk(section["top_k"], dim=-1).indices
        weights_RK = scores_RE.gather(1, ids_RK)
        if section["normalize_probabilities"]:
            weights_RK = weights_RK / weights_RK.sum(dim=-1, keepdim=True)
        return ids_RK, weights_RK * section["routed_scaling"]


def make_feed_forward(config: Any, index: int) -> nn.Module:
    """Make the mixer of `-`."""
    own = config.feed_forward
    assert own is not None, "the pattern has '-', the configuration no feed_forward section"
    limit, bias = own.get("activation_limit"), bool(own.get("bias"))
    return FeedForward(config.hidden_size, own["hidden_size"], own["activation"], limit, bias)
