"""The norm of each head's output, with an optional gate after it, that most linear mixers end with.

Initial values that several mixers share: decay rates and time steps of selective recurrences.

Both are parameters in a transformed form, so that training cannot leave their range: a rate is e^(A_log), a time step
softplus(dt_bias). They are spread over heads, so that from the start some remember a few tokens and others a thousand.

A gate on the output of attention heads (Qiu et al. 2025, arXiv 2505.06708, section 2.2).

sigmoid of a projection of the residual stream, one number per head or one per element. Softmax weights sum to 1, so a head without
a gate cannot add nothing; with it, it can. Shared by attention, window and latent attention.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from amfm.kernels.norm.op import head_norm
from amfm.model.config.options import OutputGate
from amfm.model.mixers.interface import BuildContext
from amfm.model.parallel.groups import ProcessGroupCollection
from amfm.model.parallel.layers import ColumnLinear
from amfm.model.parallel.shards import Shard, own_shapes


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
