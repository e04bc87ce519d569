"""Root-mean-square norms as they are defined, in any dtype: what every other form is compared with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def normalize(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x / sqrt(mean(x^2) + epsilon) * weight over the last dim (Zhang and Sennrich 2019, arXiv 1910.07467)."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon) * weight


def normalize_gated(y: Tensor, z: Tensor, weight: Tensor, epsilon: float, num_groups: int) -> Tensor:
    """The norm of y silu(z) over each of `num_groups` equal parts of the last dim."""
    gated = (y * F.silu(z)).unflatten(-1, (num_groups, -1))
    return normalize(gated, weight.unflatten(0, (num_groups, -1)), epsilon).flatten(-2)
