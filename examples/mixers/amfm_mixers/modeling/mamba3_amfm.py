"""The mixer of Mamba-3 of an amfm hybrid model, one input and output per head, in plain torch: token after token, no chunks.

Sizes as in linear_mixers_amfm.py; A pairs of channels turn; S: the token before the row, and its T tokens.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from amfm.pretrain.export.modeling_template.blocks_amfm import RMSNorm
from amfm.pretrain.export.modeling_template.cache_amfm import empty_rows
from amfm.pretrain.export.modeling_template.linear_mixers_amfm import LinearMixer, State


class Mamba3(LinearMixer):
    """S_t = e^(a dt) S_(t-1) + what the token before writes in all, y_t = (S_t + own write)^T C'_t + D x_t (Lahoti et al. 2026).

    B and C are normed, biased by head and turned by angles that sum up over the text; a token writes a share of its step at
    once, and the next one writes the rest for it.
    """

    convolved: ClassVar[tuple[str, ...]] = ("x", "B", "C")
    passed: ClassVar[tuple[str, ...]] = ("x", "B", "dt", "lambda")
    has_norm = False

    def __init__(self, options: dict[str, Any], config: Any, depth: float) -> None:
        super().__init__(options, config, depth)
        self.B_norm = RMSNorm(self.key_dim, config.norm_epsilon)
        self.C_norm = RMSNorm(self.key_dim, config.norm_epsilon)

    def set_sizes(self) -> None:
        """Heads with states of state_size x head_dim, groups of them that share B and C, and parameters by head."""
        self.heads, self.groups = self.options["num_heads"], self.options["num_groups"]
        self.key_dim, self.value_dim = self.options["state_size"], self.options["head_dim"]
        self.state_dims = (self.heads, self.key_dim, self.value_dim)
        self.pairs = self.key_dim // (4 if self.options["rotated"] == "half" else 2)
        self.B_bias = nn.Parameter(torch.ones(self.heads * self.key_dim))
        self.C_bias = nn.Parameter(torch.ones(self.heads * self.key_dim))
        self.D = nn.Parameter(torch.ones(self.heads))
        self.dt_bias = nn.Parameter(torch.zeros(self.heads, dtype=torch.float32))

    def part_sizes(self) -> dict[str, int]:
        """x, B, C, the gate z, and three numbers per head."""
        inner, keys = self.heads * self.value_dim, self.groups * self.key_dim
        return {"x": inner, "B": keys, "C": keys, "z": inner} | dict.fromkeys(("dt", "rate", "lambda"), self.heads)

    def shared_sizes(self) -> dict[str, int]:
        """How fast pairs turn, in all heads."""
        return {"theta": self.pairs}

    def empty_state(self, like: Tensor, rows: int) -> State:
        """Also a token before the first, which writes nothing, and no angle."""
        size = sum(self.parts[name] for name in self.passed)
        angle = empty_rows(like, rows, self.heads, self.pairs, dtype=torch.float32)
        return *super().empty_state(like, rows), empty_rows(like, rows, 1, size), angle

    def accumulate(self, parts: dict[str, Tensor], mask_BT: Tensor | None, state: State) -> State:
        """Rows of the scan, and how much of x a token reads of its own write; padding writes nothing and does not turn."""
        before_B1X, angle_BHA = state[2:]
        turns_BTHA = math.pi * parts["theta"].float().tanh()[:, :, None]
        x_BTX = parts["x"]
        if mask_BT is not None:
            x_BTX, turns_BTHA = x_BTX * mask_BT[:, :, None].to(x_BTX.dtype), turns_BTHA * mask_BT[:, :, None, None]
        seen_BSX = torch.cat(
            [before_B1X, torch.cat([x_BTX, *(parts[name] for name in self.passed[1:])], dim=-1)], dim=1
        )
        x_BSX, B_BSX, dt_BSH, blend_BSH = seen_BSX.split([self.parts[name] for name in self.passed], dim=-1)
        dt_BSH = F.softplus(dt_BSH.float() + self.dt_bias.float())
        early_BSH = blend_BSH.float().sigmoid() * dt_BSH
        turned_BTHA = (dt_BSH[:, 1:, :, None] * turns_BTHA).cumsum(1)
        angle_BSHA = torch.cat([angle_BHA[:, None], angle_BHA[:, None] + turned_BTHA], dim=1)
        rate_BTH = parts["rate"].float()
        rate_BTH = rate_BTH.clamp(min=0.0) + 1.0 / (1.0 - rate_BTH.clamp(max=0.0))
        g_BTH = -rate_BTH.clamp(min=1e-4) * dt_BSH[:, 1:]
        written_BTH = g_BTH.exp() * (early_BSH[:, :-1] + dt_BSH[:, 1:] - early_BSH[:, 1:])
        B_BSHK = self._by_head(self.B_norm, B_BSX, self.B_bias)
        C_BTHK = self._by_head(self.C_norm, parts["C"], self.C_bias)
        parts["q"] = turn(C_BTHK, angle_BSHA[:, 1:])
        parts["k"] = turn(B_BSHK[:, :-1], angle_BSHA[:, :-1]) * written_BTH[..., None]
        parts["v"], parts["g"] = x_BSX[:, :-1], g_BTH
        parts["own"] = early_BSH[:, 1:] * (B_BSHK[:, 1:] * C_BTHK).sum(-1)
        return seen_BSX[:, -1:], angle_BSHA[:, -1].remainder(2 * math.pi)

    def give_first_values(self, deviation: float) -> None:
        """D and the biases of B and C are ones."""
        for parameter in (self.B_bias, self.C_bias, self.D):
            init.ones_(parameter)

    def _by_head(self, norm: RMSNorm, part: Tensor, bias: Tensor) -> Tensor:
        """Norm by group, repeat for the heads of a group, add their biases: [B, T, H, K], float32."""
        normed = norm(part.unflatten(-1, (self.groups, -1))).float()
        return normed.repeat_interleave(self.heads // self.groups, dim=2) + bias.float().view(self.heads, -1)

    def rows(self, parts: dict[str, Tensor], positions_BT: Tensor) -> tuple[Tensor, ...]:
        """What the token before writes, and what this one reads."""
        return parts["q"], parts["k"], self.by_head(parts["v"]), parts["g"][..., None]

    def output(self, o_BTHV: Tensor, parts: dict[str, Tensor]) -> Tensor:
        """Add what a token reads of its own write and by D, times silu(z)."""
        own = (self.D.float() + parts["own"])[..., None] * self.by_head(parts["x"]).float()
        return ((o_BTHV.float() + own).flatten(-2) * F.silu(parts["z"].float())).to(o_BTHV.dtype)


def turn(x_BTHK: Tensor, angle_BTHA: Tensor) -> Tensor:
    """Rotate the first A pairs of neighbouring channels."""
    pairs = angle_BTHA.shape[-1]
    first, second = x_BTHK[..., : 2 * pairs].unflatten(-1, (pairs, 2)).unbind(-1)
    cos, sin = angle_BTHA.cos(), angle_BTHA.sin()
    turned = torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1).flatten(-2)
    return torch.cat([turned, x_BTHK[..., 2 * pairs :]], dim=-1)
