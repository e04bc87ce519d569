"""Comba and MesaNet in plain torch, token after token; sizes as in linear_mixers_amfm.py."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from amfm.pretrain.export.modeling_template.delta_mixers_amfm import GatedDeltaNet, unit_length
from amfm.pretrain.export.modeling_template.linear_mixers_amfm import LinearMixer, read


class Comba(GatedDeltaNet):
    """S <- S + beta k (v - b S^T k)^T, read along q - D b k (Hu et al. 2025, arXiv 2506.02475)."""

    def set_sizes(self) -> None:
        """b and D."""
        self.options = self.options | {"num_key_heads": None, "allow_negative_eigenvalues": False}
        super().set_sizes()
        self.feedback_logit = nn.Parameter(torch.ones(self.heads, dtype=torch.float32))
        self.D = nn.Parameter(torch.ones(self.heads))

    def rows(self, parts: dict[str, Tensor], positions_BT: Tensor) -> tuple[Tensor, ...]:
        """The delta rule of strength beta b that writes v / b."""
        _, k, v, g, beta = super().rows(parts, positions_BT)
        q, key = (self.by_head(parts[name] if self.width else F.silu(parts[name])) for name in ("q", "k"))
        b = self.feedback_logit.float().sigmoid()[:, None]
        q = (q.float() - self.D.float()[:, None] * b * key.float()).to(q.dtype)
        return unit_length(q) * self.key_dim**-0.5, k, (v.float() / b[..., None]).to(v.dtype), g, beta * b

    def output(self, o_BTHV: Tensor, parts: dict[str, Tensor]) -> Tensor:
        """Norm each head and multiply by the gate's sigmoid."""
        return (self.norm(o_BTHV).flatten(-2).float() * parts["gate"].float().sigmoid()).to(o_BTHV.dtype)


class Mesa(LinearMixer):
    """o = S^T x with (H + diag(lambda)) x = q, H the decayed sum of beta k k^T (von Oswald et al. 2025, arXiv 2506.05233)."""

    convolved: ClassVar[tuple[str, ...]] = ("q", "k")

    def set_sizes(self) -> None:
        """H stands before S."""
        super().set_sizes()
        self.state_dims = (self.heads, self.key_dim, self.key_dim + self.value_dim)
        self.beta_bias = nn.Parameter(torch.zeros(self.heads, dtype=torch.float32))
        self.decay_bias = nn.Parameter(torch.zeros(self.heads, dtype=torch.float32))
        self.ridge_logit = nn.Parameter(torch.zeros(self.heads * self.key_dim, dtype=torch.float32))

    def part_sizes(self) -> dict[str, int]:
        """q, k, v, beta, decay."""
        return super().part_sizes() | dict.fromkeys(("beta", "decay"), self.heads)

    def rows(self, parts: dict[str, Tensor], positions_BT: Tensor) -> tuple[Tensor, ...]:
        """g [B, T, H, 1], beta [B, T, H, 1]."""
        q, k = (self.by_head(parts[name] if self.width else F.silu(parts[name])) for name in self.convolved)
        g = F.logsigmoid(parts["decay"].float() + self.decay_bias.float())[..., None]
        beta = (parts["beta"].float() + self.beta_bias.float()).sigmoid()[..., None]
        return unit_length(q), unit_length(k), self.by_head(parts["v"]), g, beta

    def step(self, *token: Tensor) -> tuple[Tensor, Tensor]:
        """Write H and S, solve for x by conjugate gradients, read S."""
        q, k, v, g, beta, state = token
        state = g.exp()[..., None] * state + (beta * k)[..., None] * torch.cat([k, v], dim=-1)[..., None, :]
        ridge = self.by_head(F.softplus(self.ridge_logit.float()) + self.options["least_ridge"])
        tiny = torch.finfo(q.dtype).tiny
        x, rest, p, size = torch.zeros_like(q), q, q, q.square().sum(-1, keepdim=True)
        for _ in range(self.options["num_iterations"]):
            applied = read(state[..., : self.key_dim], p) + ridge * p
            step = size / (p * applied).sum(-1, keepdim=True).clamp(min=tiny)
            x, rest = x + step * p, rest - step * applied
            left = rest.square().sum(-1, keepdim=True)
            p, size = rest + left / size.clamp(min=tiny) * p, left
        return read(state[..., self.key_dim :], x), state

    def give_first_values(self, deviation: float) -> None:
        """lambda of 1, if that is allowed."""
        init.constant_(self.ridge_logit, math.log(math.expm1(max(1.0 - self.options["least_ridge"], 1e-3))))
