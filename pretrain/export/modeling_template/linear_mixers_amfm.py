"""Linear mixers of an amfm hybrid model together with Mamba2, in plain torch: token after token, no chunks.

Sizes: B rows, T tokens, D model, H heads, K key size, V value size, X = H * K. A row is one document.
Padding before the text, which a mask [B, T] leaves out, changes no state.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks_amfm import DepthwiseConv, RMSNorm
from .cache_amfm import empty_rows

State = tuple[Tensor, ...]
# From the projected parts to outputs [B, T, H * V] and a state.
Recurrence = Callable[[dict[str, Tensor]], tuple[Tensor, State]]


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


def no_decay(k_BTHK: Tensor) -> Tensor:
    """Gates that forget nothing."""
    return torch.zeros_like(k_BTHK[..., :1])


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
