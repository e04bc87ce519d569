"""Linear mixers in plain PyTorch, for exports with our own modeling files; sizes as in linear_mixers_amfm.py."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from amfm.pretrain.export.modeling_template.delta_mixers_amfm import Kda
from amfm.pretrain.export.modeling_template.linear_mixers_amfm import LinearMixer, State, no_decay, read
from amfm.pretrain.export.modeling_template.rotary_amfm import plain_rope, rotate, rotation

# Smaller than any logarithm of a sum, and finite, so that differences of two are numbers.
NO_SUM = -1e30


def rotary(theta: float, positions_BT: Tensor, *parts: Tensor) -> Iterator[Tensor]:
    """Rotate heads [B, T, H, K] by their positions, which count from the row's first token."""
    cos, sin = rotation(plain_rope(theta), parts[0].shape[-1], positions_BT)
    return (rotate(part, cos, sin) for part in parts)


class GatedParts(LinearMixer):
    """q, k, v and an output gate."""

    def part_sizes(self) -> dict[str, int]:
        """The gate is as wide as v."""
        return super().part_sizes() | {"gate": self.heads * self.value_dim}


class Retention(GatedParts):
    """Head h decays by 1 - 2^(-5 - h), rotary q and k (Sun et al. 2023, arXiv 2307.08621)."""

    def rows(self, parts: dict[str, Tensor], positions_BT: Tensor) -> tuple[Tensor, ...]:
        """Keys are scaled by 1 / sqrt(K)."""
        q, k, v = (self.by_head(parts[name]) for name in self.convolved)
        q, k = rotary(self.options["rope_theta"], positions_BT, q, k * self.key_dim**-0.5)
        decay_H = torch.log1p(-torch.exp2(-5.0 - torch.arange(self.heads, dtype=torch.float64)))
        return q, k, v, decay_H.float().to(q.device)[:, None].expand(*q.shape[:3], 1)


class Lightning(GatedParts):
    """Head h of H decays by e^(-2^(-8 (h + 1) / H)), less in deeper blocks (Qin et al. 2024, arXiv 2401.04658)."""

    def rows(self, parts: dict[str, Tensor], positions_BT: Tensor) -> tuple[Tensor, ...]:
        """SiLU on q, k and v."""
        q, k, v = (F.silu(self.by_head(parts[name])) for name in self.convolved)
        heads = torch.arange(1, self.heads + 1, dtype=torch.float64)
        decay_H = -torch.exp2(-8.0 * heads / self.heads) * (1.0 - self.depth + 1e-5)
        return q, k, v, decay_H.float().to(q.device)[:, None].expand(*q.shape[:3], 1)


class Plstm(LinearMixer):
    """Source, transition and mark gates (Poeppel et al. 2025, arXiv 2506.11997)."""

    gates: ClassVar[tuple[str, ...]] = ("source", "transition", "mark")

    def set_sizes(self) -> None:
        """Biases of the gates."""
        super().set_sizes()
        self.gate_bias = nn.Parameter(torch.zeros(len(self.gates), self.heads, dtype=torch.float32))

    def part_sizes(self) -> dict[str, int]:
        """q, k, v and the gates."""
        return super().part_sizes() | dict.fromkeys(self.gates, self.heads)

    def rows(self, parts: dict[str, Tensor], positions_BT: Tensor) -> tuple[Tensor, ...]:
        """What enters, stays and is read."""
        logits = (parts[name].float() + bias for name, bias in zip(self.gates, self.gate_bias.float()))
        source, transition, mark = (logit[..., None] for logit in logits)
        q, k, v = (self.by_head(parts[name]) for name in self.convolved)
        return q * (mark.sigmoid() * self.key_dim**-0.5), k, v * source.sigmoid(), F.logsigmoid(transition)


class Gla(GatedParts):
    """A decay a key channel from a low-rank projection (Yang et al. 2023, arXiv 2312.06635)."""

    def set_sizes(self) -> None:
        """Weights of the decay."""
        super().set_sizes()
        self.gate_proj = nn.Parameter(torch.zeros(self.heads * self.key_dim, self.options["gate_rank"]))
        self.gate_bias = nn.Parameter(torch.zeros(self.heads * self.key_dim, dtype=torch.float32))

    def rows(self, parts: dict[str, Tensor], positions_BT: Tensor) -> tuple[Tensor, ...]:
        """The decay's logarithm is a sixteenth of a log-sigmoid."""
        logits_BTX = F.linear(parts["low_rank"], self.gate_proj).float() + self.gate_bias.float()
        q, k, v = (self.by_head(parts[name]) for name in self.convolved)
        return q * self.key_dim**-0.5, k, v, self.by_head(F.logsigmoid(logits_BTX) / 16.0)


class LightNet(LinearMixer):
    """Keys are shares of a running softmax, which decays what came before (Qin et al. 2024, arXiv 2405.21022)."""

    def set_sizes(self) -> None:
        """Weights of the output gate."""
        super().set_sizes()
        self.gate_proj = nn.Parameter(torch.zeros(self.heads * self.value_dim, self.options["gate_rank"]))

    def empty_state(self, like: Tensor, rows: int) -> State:
        """Also the logarithm of no sum."""
        window, state = super().empty_state(like, rows)
        return window, state, state.new_full((rows, self.heads * self.key_dim), NO_SUM)

    def accumulate(self, parts: dict[str, Tensor], mask_BT: Tensor | None, state: State) -> State:
        """z_t = log(e^(k_1) + ... + e^(k_t))."""
        k_BTX = parts["k"].float()
        if mask_BT is not None:
            k_BTX = k_BTX.masked_fill(~mask_BT.bool()[:, :, None], NO_SUM)
        z_BSX = torch.cat([state[2][:, None], k_BTX], dim=1).logcumsumexp(dim=1)
        parts["z"], parts["z_before"] = z_BSX[:, 1:], z_BSX[:, :-1]
        parts["gate"] = F.linear(parts["low_rank"], self.gate_proj)
        return (z_BSX[:, -1],)

    def rows(self, parts: dict[str, Tensor], positions_BT: Tensor) -> tuple[Tensor, ...]:
        """Key e^(k - z), decay e^(z_before - z)."""
        k_BTX = (parts["k"].float() - parts["z"]).clamp(max=0.0).exp()
        g_BTX = (parts["z_before"] - parts["z"]).clamp(max=0.0)
        return tuple(self.by_head(part) for part in (F.silu(parts["q"]), k_BTX, parts["v"], g_BTX))


class Gdn2(Kda):
    """With a gate per key channel that erases and one a value channel that writes, in place of beta (Gated
    DeltaNet-2).
    """

    def set_sizes(self) -> None:
        """There is no beta that could be above 1."""
        self.options = self.options | {"allow_negative_eigenvalues": False}
        super().set_sizes()

    def part_sizes(self) -> dict[str, int]:
        """q, k, v, erase, write."""
        keys, values = self.heads * self.key_dim, self.heads * self.value_dim
        return {"q": keys, "k": keys, "v": values, "erase": keys, "write": values}

    def rows(self, parts: dict[str, Tensor], positions_BT: Tensor) -> tuple[Tensor, ...]:
        """beta [B, T, H, K]: by which a key is multiplied where it asks the state."""
        erase = self.by_head(parts["erase"]).float().sigmoid()
        q, k, v, g, _ = super().rows(parts | {"beta": erase[..., 0]}, positions_BT)
        write = self.by_head(parts["write"]).float().sigmoid()
        return q, k, (v * write.unsqueeze(3)).to(v.dtype), g, erase

    def step(self, *token: Tensor) -> tuple[Tensor, Tensor]:
        """Apply the decay, erase and write; read once."""
        q, k, v, g, erase, state = token
        state = g.exp()[..., None] * state
        key = k[:, :, 0]
        change = v[:, :, 0] - read(state, key * erase)
        state = state + key[..., :, None] * change[..., None, :]
        return read(state, q), state


class FeatureMap(LinearMixer):
    """q and k may be rotated before or after their features; nothing is forgotten."""

    def placed(self, q: Tensor, k: Tensor, positions_BT: Tensor, where: str) -> tuple[Tensor, ...]:
        """Rotate where the options say."""
        if self.options["positions"] != where:
            return q, k
        return tuple(rotary(self.options["rope_theta"], positions_BT, q, k))


class TransNormer(FeatureMap):
    """Features elu + 1 (Qin et al. 2022, arXiv 2210.10340)."""

    def rows(self, parts: dict[str, Tensor], positions_BT: Tensor) -> tuple[Tensor, ...]:
        """A norm follows, so that weights may be negative."""
        q, k = self.placed(self.by_head(parts["q"]), self.by_head(parts["k"]), positions_BT, "rope_before")
        q, k = self.placed(F.elu(q) + 1.0, F.elu(k) + 1.0, positions_BT, "rope_after")
        return q, k, self.by_head(parts["v"]), no_decay(k)


class Hedgehog(FeatureMap):
    """Learned softmax features; weights sum to 1 (Zhang et al. 2024, arXiv 2402.04347)."""

    has_norm = False

    def set_sizes(self) -> None:
        """Twice the features, and the sum of weights next to the values."""
        super().set_sizes()
        self.state_dims = (self.heads, 2 * self.key_dim, self.value_dim + 1)
        self.query_features = nn.Parameter(torch.zeros(self.heads, self.key_dim, self.key_dim))
        self.key_features = nn.Parameter(torch.zeros(self.heads, self.key_dim, self.key_dim))

    def rows(self, parts: dict[str, Tensor], positions_BT: Tensor) -> tuple[Tensor, ...]:
        """v has a last column of ones."""
        features = []
        heads = self.placed(self.by_head(parts["q"]), self.by_head(parts["k"]), positions_BT, "rope_before")
        for x, weight in zip(heads, (self.query_features, self.key_features)):
            mapped = torch.einsum("bthk,hjk->bthj", x, weight).float()
            features.append(torch.cat([mapped.softmax(-1), (-mapped).softmax(-1)], dim=-1))
        return *features, F.pad(self.by_head(parts["v"]), (0, 1), value=1.0), no_decay(features[1])

    def output(self, o_BTHV: Tensor, parts: dict[str, Tensor]) -> Tensor:
        """Over the sum of weights."""
        return (o_BTHV[..., :-1] / o_BTHV[..., -1:]).flatten(-2)


class Mala(FeatureMap):
    """(1 + 1 / Z) sum_j (q k_j) v_j - Z mean_j v_j, Z = q sum_j k_j (Fan et al. 2025, arXiv 2507.00698)."""

    def set_sizes(self) -> None:
        """A row and a column for the sums."""
        super().set_sizes()
        self.state_dims = (self.heads, self.key_dim + 1, self.value_dim + 1)

    def rows(self, parts: dict[str, Tensor], positions_BT: Tensor) -> tuple[Tensor, ...]:
        """Two reads a head: of keys, and of sums."""
        q, k = (self.by_head(parts[name]).float() for name in ("q", "k"))
        q, k = (F.elu(x) + 1.0 for x in self.placed(q, k, positions_BT, "rope_before"))
        reads = torch.cat([F.pad(q, (0, 1)), F.pad(torch.zeros_like(q), (0, 1), value=1.0)], dim=2)
        k, v = (F.pad(x, (0, 1), value=1.0) for x in (k, self.by_head(parts["v"]).float()))
        return reads, k, v, no_decay(k)

    def output(self, o_BTHV: Tensor, parts: dict[str, Tensor]) -> Tensor:
        """From both reads."""
        weighted, summed = o_BTHV.float().chunk(2, dim=2)
        total = weighted[..., -1:]
        mixed = (1.0 + 1.0 / total) * weighted[..., :-1] - total * summed[..., :-1] / summed[..., -1:]
        return super().output(mixed.to(o_BTHV.dtype), parts)


class Mamba1(LinearMixer):
    """h_t = e^(dt_t A) h_(t-1) + dt_t x_t B_t, y_t = C_t h_t + D x_t (Gu and Dao 2023, arXiv 2312.00752)."""

    convolved: ClassVar[tuple[str, ...]] = ("x",)
    has_norm = False

    def set_sizes(self) -> None:
        """Each channel is a head with values of one number."""
        self.heads, self.key_dim, self.value_dim = self.options["inner_size"], self.options["state_size"], 1
        self.state_dims = (self.heads, self.key_dim, 1)
        self.rank = self.options["dt_rank"] or math.ceil(self.hidden_size / 16)
        self.x_proj = nn.Linear(self.heads, self.rank + 2 * self.key_dim, bias=False)
        self.dt_proj = nn.Parameter(torch.zeros(self.heads, self.rank))
        self.A_log = nn.Parameter(torch.zeros(self.heads, self.key_dim, dtype=torch.float32))
        self.D = nn.Parameter(torch.ones(self.heads))
        self.dt_bias = nn.Parameter(torch.zeros(self.heads, dtype=torch.float32))

    def part_sizes(self) -> dict[str, int]:
        """x and the gate z."""
        return {"x": self.heads, "z": self.heads}

    def rows(self, parts: dict[str, Tensor], positions_BT: Tensor) -> tuple[Tensor, ...]:
        """C, B, x and the time step."""
        x_BTC = parts["x"] if self.width else F.silu(parts["x"])
        dt_BTR, B_BTN, C_BTN = self.x_proj(x_BTC).split([self.rank, self.key_dim, self.key_dim], dim=-1)
        dt_BTC = F.softplus(F.linear(dt_BTR, self.dt_proj).float() + self.dt_bias.float())
        return C_BTN, B_BTN, x_BTC, dt_BTC

    def step(self, *token: Tensor) -> tuple[Tensor, Tensor]:
        """One token: C and B [B, N], x and dt [B, C], the state."""
        q, k, v, g, state = token
        decay = (g[..., None] * -self.A_log.float().exp()).exp()
        state = decay[..., None] * state + ((g * v)[..., None] * k[:, None])[..., None]
        y_BC = torch.einsum("bn,bcn->bc", q, state[..., 0]) + self.D.float() * v
        return y_BC[..., None], state

    def output(self, o_BTHV: Tensor, parts: dict[str, Tensor]) -> Tensor:
        """Times silu(z)."""
        return o_BTHV.flatten(-2) * F.silu(parts["z"])

    def give_first_values(self, deviation: float) -> None:
        """D of ones, decays uniform."""
        init.ones_(self.D)
        init.copy_(self.A_log, torch.empty_like(self.A_log).uniform_(1, 16).log_())
