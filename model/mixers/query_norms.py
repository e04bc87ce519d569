"""Norms of queries and keys: of each head, which the rotation's kernel computes, or of all heads together."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from amfm.kernels.norm.op import rms_norm
from amfm.model.mixers.interface import BuildContext
from amfm.model.parallel.regions import sum_parts
from amfm.model.parallel.shards import Shard, ShardSpec, own_shapes


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
