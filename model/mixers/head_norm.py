"""The norm of each head's output, with an optional gate after it, that most linear mixers end with."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from amfm.kernels.norm.op import rms_norm
from amfm.model.mixers.interface import BuildContext
from amfm.model.parallel.shards import Shard


class GatedHeadNorm(nn.Module):
    """RMSNorm over each head, then times `activate`(gate): [B, T, H, V] -> [B, T, H V]; one weight [V] for all heads."""

    def __init__(
        self, value_dim: int, build: BuildContext, activate: Callable[[Tensor], Tensor] = functional.silu
    ) -> None:
        super().__init__()
        self.activate = activate
        self.weight = nn.Parameter(torch.empty(value_dim))
        # One weight serves the heads of all tensor ranks.
        self.shards = {"weight": Shard(partial=("tp",))}
        self.epsilon, self.backend = build.norm_epsilon, build.backend

    def forward(self, o_BTHV: Tensor, gate_BTI: Tensor | None) -> Tensor:
        """Norm o [B, T, H, V] by head and multiply by the activated gate [B, T, H V], in float32 for bf16."""
        normed_BTI = rms_norm(o_BTHV.contiguous(), self.weight, self.epsilon, backend=self.backend).flatten(-2)
        if gate_BTI is None:
            return normed_BTI
        wide = torch.promote_types(gate_BTI.dtype, torch.float32)
        return (normed_BTI.to(wide) * self.activate(gate_BTI.to(wide))).to(o_BTHV.dtype)
