"""Log-linear Mamba2 in plain torch, token after token: a state for each bit of a token's place; sizes as in linear_mixers_amfm.py."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from amfm.pretrain.export.modeling_template.linear_mixers_amfm import LinearMixer


class LogLinear(LinearMixer):
    """Reads the sum over levels of lambda times what a level's state returns (Guo et al. 2025, arXiv 2506.04761)."""

    convolved: ClassVar[tuple[str, ...]] = ("x", "B", "C")

    def set_sizes(self) -> None:
        """A matrix of N x P for each level above 0."""
        self.heads, self.groups = self.options["num_heads"], self.options["num_groups"]
        self.key_dim, self.value_dim = self.options["state_size"], self.options["head_dim"]
        self.levels = self.options["max_tokens"].bit_length()
        self.state_dims = (self.heads, (self.levels - 1) * self.key_dim, self.value_dim)
        self.A_log = nn.Parameter(torch.zeros(self.heads, dtype=torch.float32))
        self.dt_bias = nn.Parameter(torch.zeros(self.heads, dtype=torch.float32))
        self.D = nn.Parameter(torch.ones(self.heads))
        self.L = nn.Parameter(torch.ones(self.heads * self.levels))

    def part_sizes(self) -> dict[str, int]:
        """x, B, C, z, dt, a number a level."""
        inner, keys = self.heads * self.value_dim, self.groups * self.key_dim
        return {"x": inner, "B": keys, "C": keys, "z": inner, "dt": self.heads, "level": self.heads * self.levels}

    def rows(self, parts: dict[str, Tensor], positions_BT: Tensor) -> tuple[Tensor, ...]:
        """C, B, x dt, the decay, weights of levels, places."""
        if not self.width:
            parts |= {name: F.silu(parts[name]) for name in self.convolved}
        dt = F.softplus(parts["dt"].float() + self.dt_bias.float())
        q, k = (
            parts[name].unflatten(-1, (self.groups, -1)).repeat_interleave(self.heads // self.groups, dim=2)
            for name in ("C", "B")
        )
        weight = F.softplus(self.L.float().view(self.heads, -1) * self.by_head(parts["level"]).float())
        v = self.by_head(parts["x"]) * dt[..., None]
        return q, k, v.to(parts["x"].dtype), -self.A_log.float().exp() * dt, weight, positions_BT

    def step(self, *token: Tensor) -> tuple[Tensor, Tensor]:
        """Read the levels of the bits that are set; merge those of the lowest ones, and the token, into the next."""
        q, k, v, g, weight, place, state = token
        tree = state.unflatten(2, (self.levels - 1, -1)) * g.exp()[..., None, None, None]
        bits = (place[:, None].long() >> torch.arange(self.levels - 1, device=place.device)) & 1
        read = torch.einsum("bhk,bhlkv,bhl->bhv", q, tree, weight[..., 1:] * bits[:, None])
        carried = bits.cumprod(1)
        merged = k[..., None] * v[:, :, None] + torch.einsum("bhlkv,bl->bhkv", tree, carried.float())
        is_next = F.pad(carried, (1, 0), value=1)[:, :-1] - carried
        tree = torch.where(is_next[:, None, :, None, None] == 1, merged[:, :, None], tree)
        own = (q * k).sum(-1, keepdim=True) * weight[..., :1] * v
        return read + own, tree.flatten(2, 3)

    def output(self, o_BTHV: Tensor, parts: dict[str, Tensor]) -> Tensor:
        """Add D x, norm each head, times silu(z)."""
        o_BTHV = o_BTHV + self.D.to(o_BTHV.dtype)[:, None] * self.by_head(parts["x"])
        return super().output(o_BTHV, {"gate": parts["z"]})

    def give_first_values(self, deviation: float) -> None:
        """D and L of ones, rates uniform."""
        init.ones_(self.D)
        init.ones_(self.L)
        init.copy_(self.A_log, torch.empty_like(self.A_log).uniform_(1, 16).log_())
