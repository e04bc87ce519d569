"""The norm of each head's output, with an optional gate after it, that most linear mixers end with.

Initial values that several mixers share: decay rates and time steps of selective recurrences.

Both are parameters in a transformed form, so that training cannot leave their range: a rate is e^(A_log), a time step
softplus(dt_bias). They are spread over heads, so that from the start some remember a few tokens and others a thousand.

A gate on the output of attention heads (Qiu et al. 2025, arXiv 2505.06708, section 2.2).

sigmoid of a projection of the residual stream, one number per head or one per element. Softmax weights sum to 1, so a head without
a gate cannot add nothing; with it, it can. Shared by attention, window and latent attention.

Norms of queries and keys: of each head, which the rotation's kernel computes, or of all heads together.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from amfm.kernels.norm.op import head_norm, rms_norm
from amfm.model.config.options import OutputGate
from amfm.model.mixers.interface import BuildContext
from amfm.model.parallel.groups import ProcessGroupCollection
from amfm.model.parallel.layers import ColumnLinear
from amfm.model.parallel.regions import sum_parts
from amfm.model.parallel.shards import Shard, ShardSpec, own_shapes


def gate_projection(
    kind: OutputGate, hidden_size: int, num_heads: int, head_dim: int, groups: ProcessGroupCollection, *, name: str
) -> ColumnLinear | None:
    """Build the projection to gates, one per element of each head or one per head, cut by heads; None without gates."""
    if kind == "none":
        return None
    rows = num_heads * (head_dim if kind == "element" else 1)
    return ColumnLinear(hidden_size, (rows,), groups, name=name, units=(num_heads,))


def gate_heads(o_BTHK: Tensor, gate_BTX: Tensor) -> Tensor:
    """Multiply o [B, T, H, K] by sigmoid(gate), of which each head has K numbers or one: [B, T, H K] or [B, T, H]."""
    return o_BTHK * torch.sigmoid(gate_BTX).unflatten(-1, (o_BTHK.shape[2], -1))


def first_decay_rates(
    shape: tuple[int, ...], generator: torch.Generator, *, low: float = 1.0, high: float = 16.0
) -> Tensor:
    """Draw log(-A) with -A uniform in a range (Gu et al. 2022, arXiv 2206.11893, section 4), float32."""
    return torch.empty(shape).uniform_(low, high, generator=generator).log()


def first_time_steps(
    shape: tuple[int, ...], generator: torch.Generator, *, low: float = 1e-3, high: float = 1e-1, floor: float = 1e-4
) -> Tensor:
    """Draw the inverse softplus of log-uniform time steps (Gu and Dao 2023, arXiv 2312.00752, section 3.6), float32."""
    step = torch.empty(shape).uniform_(math.log(low), math.log(high), generator=generator).exp().clamp_(min=floor)
    # log(e^s - 1) = s + log(1 - e^-s), which loses no digits for small s.
    return step + torch.log(-torch.expm1(-step))


class GatedHeadNorm(nn.Module):
    """RMSNorm over each head, then times `act`(gate): [B, T, H, V] -> [B, T, H V]; one weight [V] for all heads."""

    extra_repr = own_shapes

    def __init__(
        self,
        value_dim: int,
        build: BuildContext,
        act: Literal["silu", "sigmoid"] = "silu",
        epsilon: float | None = None,
    ) -> None:
        super().__init__()
        self.act = act
        self.weight = nn.Parameter(torch.empty(value_dim))
        # One weight serves the heads of all tensor ranks.
        self.shards = {"weight": Shard(partial=("tp",))}
        self.epsilon, self.backend = epsilon or build.norm_epsilon, build.backend

    def forward(self, o_BTHV: Tensor, gate_BTI: Tensor | None) -> Tensor:
        """Norm o [B, T, H, V] by head and multiply by the activated gate [B, T, H V], in float32 for bf16."""
        return head_norm(o_BTHV, gate_BTI, self.weight, self.epsilon, act=self.act, backend=self.backend)


class HeadNorm(nn.Module):
    """The weight [head_dim] of the RMSNorm that every query (or key) head passes."""

    extra_repr = own_shapes

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(head_dim))
        # One weight serves the heads of all tensor ranks.
        self.shards = {"weight": Shard(partial=("tp",))}


class WideNorm(nn.Module):
    """RMSNorm over all heads of queries (or keys) together, as in OLMo 2 (arXiv 2501.00656, section 3.2).

    Tensor ranks have some of the heads, and sum their squares. num_heads: of all ranks.
    """

    def __init__(self, num_heads: int, head_dim: int, build: BuildContext) -> None:
        super().__init__()
        self.groups, self.epsilon, self.backend = build.groups, build.norm_epsilon, build.backend
        self.width, ranks = num_heads * head_dim, build.groups.tp.size()
        # Ranks that hold a copy of the same key head count it once.
        self.copies = max(1, ranks // num_heads)
        self.weight = nn.Parameter(torch.empty(max(1, num_heads // ranks) * head_dim))
        self.shards = {"weight": Shard((ShardSpec(0, "tp", (self.width,), (num_heads,)),))}

    def forward(self, x_BTX: Tensor) -> Tensor:
        """Normalise x [B, T, H K] of this rank, keeping shape and dtype. Every rank of `groups.tp` must call."""
        if self.groups.tp.size() == 1:
            return rms_norm(x_BTX, self.weight, self.epsilon, backend=self.backend)
        wide_BTX = x_BTX.to(torch.float64 if x_BTX.dtype == torch.float64 else torch.float32)
        sums_BT1 = sum_parts(wide_BTX.square().sum(-1, keepdim=True) / self.copies, self.groups)
        normed_BTX = wide_BTX * torch.rsqrt(sums_BT1 / self.width + self.epsilon)
        return (normed_BTX * self.weight.to(wide_BTX.dtype)).to(x_BTX.dtype)


def query_norm(kind: bool | str, num_heads: int, head_dim: int, build: BuildContext) -> HeadNorm | WideNorm | None:
    """Build the norm of so many query or key heads, of all ranks; None without one."""
    if kind == "wide":
        return WideNorm(num_heads, head_dim, build)
    return HeadNorm(head_dim) if kind else None
