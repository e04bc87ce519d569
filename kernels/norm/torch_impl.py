"""Root-mean-square norms with PyTorch and a hand-written backward; plain compositions for the compiler.

With a the normed input, r = 1 / sqrt(mean(a^2) + epsilon), n = a r and output n w:
d_a = r (dy w - n mean(dy w n)) and dw = sum over rows of dy n.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.norm.reference import normalize, normalize_gated


def rms_norm_torch(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """`rms_norm` without a residual."""
    if torch.compiler.is_compiling():
        wide = _wide(x)
        return normalize(x.to(wide), weight.to(wide), epsilon).to(x.dtype)
    return _RmsNorm.apply(x, weight, epsilon)


def gated_rms_norm_torch(y: Tensor, z: Tensor, weight: Tensor, epsilon: float, num_groups: int) -> Tensor:
    """`gated_rms_norm`."""
    if torch.compiler.is_compiling():
        wide = _wide(y)
        return normalize_gated(y.to(wide), z.to(wide), weight.to(wide), epsilon, num_groups).to(y.dtype)
    return _GatedRmsNorm.apply(y, z, weight, epsilon, num_groups)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _reciprocal_rms(a: Tensor, epsilon: float) -> Tensor:
    """1 / sqrt(mean(a^2) + epsilon) over the last dim, kept as a dim of 1."""
    norm = torch.linalg.vector_norm(a, dim=-1, keepdim=True)
    return norm.mul_(a.shape[-1] ** -0.5).square_().add_(epsilon).rsqrt_()


def _norm_backward(dy: Tensor, a: Tensor, r: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the normed input and of the weight; rows [..., groups, size], weight [groups, size]."""
    n = a * r
    product = dy * n
    d_weight = product.flatten(0, -3).sum(0)
    mean = product.mul_(weight).mean(-1, keepdim=True)
    da = (dy * weight).mul_(r)
    return da.addcmul_(n, mean.mul_(r), value=-1.0), d_weight


class _RmsNorm(torch.autograd.Function):
    """Saves x and one number a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        wide = _wide(x)
        a = x.to(wide)
        r = _reciprocal_rms(a, epsilon)
        ctx.save_for_backward(x, weight, r)
        return (a * r).mul_(weight.to(wide)).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, r = ctx.saved_tensors
        wide = r.dtype
        rows = (dy.to(wide).unsqueeze(-2), x.to(wide).unsqueeze(-2), r.unsqueeze(-2), weight.to(wide).unsqueeze(0))
        dx, d_weight = _norm_backward(*rows)
        return dx.squeeze(-2).to(x.dtype), d_weight.squeeze(0).to(weight.dtype), None


class _GatedRmsNorm(torch.autograd.Function):
    """Saves y, z and one number a row and group."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, z: Tensor, weight: Tensor, epsilon: float, num_groups: int) -> Tensor:
        wide = _wide(y)
        a = F.silu(z.to(wide)).mul_(y).unflatten(-1, (num_groups, -1))
        r = _reciprocal_rms(a, epsilon)
        ctx.save_for_backward(y, z, weight, r)
        ctx.num_groups = num_groups
        return a.mul_(r).flatten(-2).mul_(weight.to(wide)).to(y.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        y, z, weight, r = ctx.saved_tensors
        wide, groups = r.dtype, (ctx.num_groups, -1)
        y_wide, z_wide = y.to(wide), z.to(wide)
        gate = F.silu(z_wide)
        a = (gate * y_wide).unflatten(-1, groups)
        rows = (d_out.to(wide).unflatten(-1, groups), a, r, weight.to(wide).unflatten(0, groups))
        d_a, d_weight = _norm_backward(*rows)
        d_a = d_a.flatten(-2)
        dz = torch.ops.aten.silu_backward(d_a * y_wide, z_wide)
        dy = gate.mul_(d_a)
        return dy.to(y.dtype), dz.to(z.dtype), d_weight.flatten().to(weight.dtype), None, None
