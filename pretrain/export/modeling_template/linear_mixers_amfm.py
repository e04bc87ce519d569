"""Linear mixers of an amfm hybrid model together with Mamba2, in plain torch: token after token, no chunks.

Sizes: B rows, T tokens, D model, H heads, K key size, V value size, X = H * K. A row is one document.
Padding before the text, which a mask [B, T] leaves out, changes no state.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks_amfm import DepthwiseConv, RMSNorm
from .cache_amfm import empty_rows
from .rotary_amfm import plain_rope, rotate, rotation

State = tuple[Tensor, ...]
# From the projected parts to outputs [B, T, H * V] and a state.
Recurrence = Callable[[dict[str, Tensor]], tuple[Tensor, State]]
# Smaller than any logarithm of a sum, and finite, so that differences of two are numbers.
NO_SUM = -1e30


class LinearMixer(nn.Module):
    """Projection, convolution, a recurrence over states [B, H, K, V], an output function, projection.

    The recurrence here: S_t = diag(e^(g_t)) S_(t-1) + k_t v_t^T, o_t = S_t^T q_t.
    """

    convolved: ClassVar[tuple[str, ...]] = ("q", "k", "v")
    has_norm = True

    def __init__(self, options: dict[str, Any], config: Any, depth: float) -> None:
        super().__init__()
        self.options, self.depth, self.hidden_size = options, depth, config.hidden_size
        self.set_sizes()
        self.parts = self.part_sizes()
        self.in_proj = nn.Linear(config.hidden_size, sum(self.parts.values()), bias=False)
        self.shared_parts = self.shared_sizes()
        rank = sum(self.shared_parts.values())
        self.shared_proj = nn.Parameter(torch.zeros(rank, config.hidden_size)) if rank else None
        self.channels, self.width = sum(self.parts[name] for name in self.convolved), options["conv_kernel"]
        self.conv = DepthwiseConv(self.channels, self.width, has_bias=False) if self.width else None
        if self.has_norm:
            self.norm = RMSNorm(self.value_dim, options.get("head_norm_epsilon") or config.norm_epsilon)
        self.out_proj = nn.Linear(self.heads * self.value_dim, config.hidden_size, bias=False)

    def set_sizes(self) -> None:
        """Heads and their sizes."""
        self.heads, self.key_dim = self.options["num_heads"], self.options["head_dim"]
        self.value_dim = self.options["value_head_dim"] or self.key_dim
        self.state_dims = (self.heads, self.key_dim, self.value_dim)

    def part_sizes(self) -> dict[str, int]:
        """Channels of what in_proj gives, in order."""
        keys = self.heads * self.key_dim
        return {"q": keys, "k": keys, "v": self.heads * self.value_dim}

    def shared_sizes(self) -> dict[str, int]:
        """Channels of what shared_proj gives, in order: the insides of low-rank projections."""
        rank = self.options.get("gate_rank")
        return {"low_rank": rank} if rank else {}

    def empty_state(self, like: Tensor, rows: int) -> State:
        """Zeros for the convolution's window [B, W - 1, C] and the float32 state before the first token."""
        window = empty_rows(like, rows, max(self.width - 1, 0), self.channels)
        return window, empty_rows(like, rows, *self.state_dims, dtype=torch.float32)

    def forward(
        self,
        x_BTD: Tensor,
        mask_BT: Tensor | None,
        positions_BT: Tensor,
        state: State | None,
        recur: Recurrence | None = None,
    ) -> tuple[Tensor, State]:
        """x [B, T, D] -> y [B, T, D] and the state after it; `recur`: stands in for the recurrence and its output."""
        parts = self.project(x_BTD)
        if recur is not None:
            y_BTI, state = recur(parts)
        else:
            state = state or self.empty_state(parts[self.convolved[0]], len(x_BTD))
            o_BTHV, state = self.mix(parts, mask_BT, positions_BT, state)
            y_BTI = self.output(o_BTHV, parts)
        return self.out_proj(y_BTI), state

    def project(self, x_BTD: Tensor) -> dict[str, Tensor]:
        """Compute the parts [B, T, channels] by name, those of low-rank projections too."""
        parts = dict(zip(self.parts, self.in_proj(x_BTD).split(list(self.parts.values()), dim=-1)))
        if self.shared_proj is not None:
            parts |= zip(
                self.shared_parts, F.linear(x_BTD, self.shared_proj).split([*self.shared_parts.values()], dim=-1)
            )
        return parts

    def mix(
        self, parts: dict[str, Tensor], mask_BT: Tensor | None, positions_BT: Tensor, state: State
    ) -> tuple[Tensor, State]:
        """Convolve the parts and run the recurrence: what it reads [B, T, H, V], and the state after it."""
        window = state[0]
        dtype = parts[self.convolved[0]].dtype
        if self.conv is not None:
            inputs_BTC = torch.cat([parts[name] for name in self.convolved], dim=-1)
            if mask_BT is not None:
                inputs_BTC = inputs_BTC * mask_BT[:, :, None].to(dtype)
            outputs_BTC, window = self.conv(inputs_BTC, window)
            parts |= zip(self.convolved, outputs_BTC.split([self.parts[name] for name in self.convolved], dim=-1))
        summed = self.accumulate(parts, mask_BT, state)
        o_BTHV, last = scan(self.step, self.rows(parts, positions_BT), mask_BT, state[1])
        return o_BTHV.to(dtype), (window, last, *summed)

    def accumulate(self, parts: dict[str, Tensor], mask_BT: Tensor | None, state: State) -> State:
        """Add sums over earlier tokens to the parts; returns what of them the next tokens need."""
        return ()

    def rows(self, parts: dict[str, Tensor], positions_BT: Tensor) -> tuple[Tensor, ...]:
        """Compute what `step` reads of each token, [B, T, ...] each; every mixer has its own."""
        raise NotImplementedError

    def step(self, *token: Tensor) -> tuple[Tensor, Tensor]:
        """One token: q [B, H, K] (or several reads, one after the other in H), k, v, g [B, H, 1 or K], the state."""
        q, k, v, g, state = token
        state = g.exp()[..., None] * state + k[..., :, None] * v[..., None, :]
        return read(state, q), state

    def output(self, o_BTHV: Tensor, parts: dict[str, Tensor]) -> Tensor:
        """Norm each head, and multiply by the gate's SiLU if there is a gate: [B, T, H, V] -> [B, T, H * V]."""
        normed = self.norm(o_BTHV).flatten(-2)
        gate = parts.get("gate")
        return normed if gate is None else (normed.float() * F.silu(gate.float())).to(normed.dtype)

    def by_head(self, part: Tensor) -> Tensor:
        """[..., H * size] -> [..., H, size]."""
        return part.unflatten(-1, (self.heads, -1))


def scan(
    step: Callable[..., tuple[Tensor, Tensor]], rows: tuple[Tensor, ...], mask_BT: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Apply `step` to one token after the other, in float32; a masked token leaves the state as it was.

    rows: parts [B, T, ...]. Returns outputs [B, T, H, V] and the last state.
    """
    wide = tuple(row.float() for row in rows)
    outputs = []
    for token in range(rows[0].shape[1]):
        o_BHV, following = step(*(row[:, token] for row in wide), state)
        state = (
            following if mask_BT is None else torch.where(mask_BT[:, token, None, None, None].bool(), following, state)
        )
        outputs.append(o_BHV)
    return torch.stack(outputs, dim=1), state


def read(state_BHKV: Tensor, q: Tensor) -> Tensor:
    """S^T q of every read: q [B, R * H, K] -> [B, R * H, V]."""
    q_BRHK = q.unflatten(1, (-1, state_BHKV.shape[1]))
    return torch.einsum("brhk,bhkv->brhv", q_BRHK, state_BHKV).flatten(1, 2)


def rotary(theta: float, positions_BT: Tensor, *parts: Tensor) -> Iterator[Tensor]:
    """Rotate heads [B, T, H, K] by their positions, which count from the row's first token."""
    cos, sin = rotation(plain_rope(theta), parts[0].shape[-1], positions_BT)
    return (rotate(part, cos, sin) for part in parts)


def no_decay(k_BTHK: Tensor) -> Tensor:
    """Gates that forget nothing."""
    return torch.zeros_like(k_BTHK[..., :1])


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


class Hgrn2(LinearMixer):
    """What the forget gate lets go is the key (Qin et al. 2024, arXiv 2404.07904)."""

    convolved: ClassVar[tuple[str, ...]] = ("q", "forget", "v")

    def set_sizes(self) -> None:
        """The gate's lower bound."""
        super().set_sizes()
        self.bound_logit = nn.Parameter(torch.zeros(self.heads * self.key_dim, dtype=torch.float32))

    def part_sizes(self) -> dict[str, int]:
        """q, the forget gate, v."""
        keys = self.heads * self.key_dim
        return {"q": keys, "forget": keys, "v": self.heads * self.value_dim}

    def rows(self, parts: dict[str, Tensor], positions_BT: Tensor) -> tuple[Tensor, ...]:
        """log(bound + (1 - bound) sigmoid(x))."""
        q_BTX = parts["q"] if self.width else F.silu(parts["q"])
        bound = self.bound_logit.float()
        forget_BTX = F.logsigmoid(parts["forget"].float()) + F.logsigmoid(-bound)
        g_BTX = torch.logaddexp(F.logsigmoid(bound), forget_BTX)
        return tuple(self.by_head(part) for part in (q_BTX, -torch.expm1(g_BTX), parts["v"], g_BTX))


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
