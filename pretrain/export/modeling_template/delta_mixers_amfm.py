"""Mixers of an amfm hybrid model that overwrite: DeltaNet, Gated DeltaNet, DeltaProduct, KDA; sizes as in linear_mixers_amfm.py.

G key heads, N delta rules per token. A delta rule writes the difference between a value and what the state returns for its
key, so that a key that comes again is overwritten and not added to.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .linear_mixers_amfm import LinearMixer, no_decay, read


class DeltaNet(LinearMixer):
    """S <- (I - beta k k^T) S + beta k v^T (Yang et al. 2024, arXiv 2406.06484)."""

    has_gate = False

    def set_sizes(self) -> None:
        """Fewer key heads than value heads, several steps per token."""
        super().set_sizes()
        self.key_heads, self.steps = self.options["num_key_heads"] or self.heads, self.options.get("num_steps", 1)
        self.has_decay = self.options.get("decay", self.has_gate)
        if self.has_decay:
            self.A_log = nn.Parameter(torch.zeros(self.heads, dtype=torch.float32))
            self.dt_bias = nn.Parameter(torch.zeros(self.heads, dtype=torch.float32))

    def part_sizes(self) -> dict[str, int]:
        """q, k, v, beta, what decides the decay, gate."""
        keys, values = self.key_heads * self.key_dim, self.heads * self.value_dim
        sizes = {"q": keys, "k": keys * self.steps, "v": values * self.steps, "beta": self.heads * self.steps}
        sizes |= {"decay": self.heads} if self.has_decay else {}
        return sizes | ({"gate": values} if self.has_gate else {})

    def rows(self, parts: dict[str, Tensor], positions_BT: Tensor) -> tuple[Tensor, ...]:
        """q [B, T, G, K], k [B, T, G, N, K], v [B, T, H, N, V], g [B, T, H, 1], beta [B, T, H, N]."""
        q, k, v = (parts[name] if self.width else F.silu(parts[name]) for name in self.convolved)
        q = unit_length(q.unflatten(-1, (self.key_heads, self.key_dim))) * self.key_dim**-0.5
        k = unit_length(k.unflatten(-1, (self.key_heads, self.steps, self.key_dim)))
        beta = self.by_head(parts["beta"]).float().sigmoid() * (1 + self.options["allow_negative_eigenvalues"])
        g = no_decay(beta)
        if self.has_decay:
            time = F.softplus(parts["decay"].float() + self.dt_bias.float())
            g = (-self.A_log.float().exp() * time)[..., None]
        return q, k, v.unflatten(-1, (self.heads, self.steps, self.value_dim)), g, beta

    def step(self, *token: Tensor) -> tuple[Tensor, Tensor]:
        """Apply the decay and then N delta rules, one after the other, to the state of one token's rows; read it once."""
        q, k, v, g, beta, state = token
        repeat = self.heads // self.key_heads
        state = g.exp()[..., None] * state
        for index in range(self.steps):
            key = k[:, :, index].repeat_interleave(repeat, dim=1)
            change = beta[..., index, None] * (v[:, :, index] - read(state, key))
            state = state + key[..., :, None] * change[..., None, :]
        return read(state, q.repeat_interleave(repeat, dim=1)), state


class GatedDeltaNet(DeltaNet):
    """With decay and output gate (Yang et al. 2024, arXiv 2412.06464); also DeltaProduct (Siems et al., arXiv 2502.10297)."""

    has_gate = True


class Kda(DeltaNet):
    """With a decay a key channel and a sigmoid as output gate (Kimi Team 2025, arXiv 2510.26692), of low rank or whole."""

    def set_sizes(self) -> None:
        """Add the low-rank weights of the decay and of the output gate; as many key heads as value heads."""
        self.options = self.options | {"num_key_heads": None}
        super().set_sizes()
        # Exports of earlier versions have neither.
        self.is_whole, self.floor = self.options.get("gates") == "full", self.options.get("decay_floor")
        rank = self.options["gate_rank"] or self.key_dim
        self.A_log = nn.Parameter(torch.zeros(self.heads, dtype=torch.float32))
        self.dt_bias = nn.Parameter(torch.zeros(self.heads * self.key_dim, dtype=torch.float32))
        if not self.is_whole:
            self.decay_proj = nn.Parameter(torch.zeros(self.heads * self.key_dim, rank))
            self.gate_proj = nn.Parameter(torch.zeros(self.heads * self.value_dim, rank))

    def part_sizes(self) -> dict[str, int]:
        """q, k, v, beta; whole projections of decay and gate."""
        sizes = super().part_sizes()
        if self.is_whole:
            sizes |= {"decay": self.heads * self.key_dim, "gate": self.heads * self.value_dim}
        return sizes

    def shared_sizes(self) -> dict[str, int]:
        """Inner widths of the low-rank projections of decay and gate."""
        return {} if self.is_whole else dict.fromkeys(("decay_inside", "gate_inside"), self.decay_proj.shape[1])

    def rows(self, parts: dict[str, Tensor], positions_BT: Tensor) -> tuple[Tensor, ...]:
        """g [B, T, H, K]."""
        q, k, v, _, beta = super().rows(parts, positions_BT)
        raw = parts["decay"] if self.is_whole else F.linear(parts["decay_inside"], self.decay_proj)
        time, rate = self.by_head(raw.float() + self.dt_bias.float()), self.A_log.float().exp()[:, None]
        g = -rate * F.softplus(time) if self.floor is None else self.floor * (rate * time).sigmoid()
        return q, k, v, g, beta

    def output(self, o_BTHV: Tensor, parts: dict[str, Tensor]) -> Tensor:
        """Norm each head and multiply by the gate's sigmoid: [B, T, H, V] -> [B, T, H * V]."""
        gate = (parts["gate"] if self.is_whole else F.linear(parts["gate_inside"], self.gate_proj)).float()
        return (self.norm(o_BTHV).flatten(-2).float() * gate.sigmoid()).to(o_BTHV.dtype)


def unit_length(x: Tensor) -> Tensor:
    """Scale vectors of the last dimension to length 1, in float32."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + 1e-6)).to(x.dtype)
