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

# Values of one intermediate tensor in a block: 512 KiB of float32.
_BLOCK_VALUES = 131072


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


def _cut_rows(rows: int, width: int) -> list[slice]:
    """Blocks of rows whose intermediate values stay in a core's cache, instead of passing through memory."""
    step = max(1, _BLOCK_VALUES // max(width, 1))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def _normalize_backward(do: Tensor, n: Tensor, r: Tensor, weight: Tensor, out: Tensor, d_weight: Tensor) -> None:
    """Gradient of the normed input into `out`; adds to d_weight. Rows [rows, groups, size], weight [groups, size]."""
    torch.mul(do, n, out=out)
    d_weight += out.sum(0)
    mean = out.mul_(weight).sum(-1, keepdim=True)
    torch.mul(do, weight, out=out).mul_(r)
    out.addcmul_(n, mean.mul_(r), value=-1.0 / n.shape[-1])


class _RmsNorm(torch.autograd.Function):
    """Saves x and one number a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        wide = _wide(x)
        rows, w = x.reshape(-1, x.shape[-1]), weight.to(wide)
        out = torch.empty_like(rows)
        r = torch.empty(rows.shape[0], 1, dtype=wide, device=x.device)
        for block in _cut_rows(*rows.shape):
            a = rows[block].to(wide)
            r[block] = _reciprocal_rms(a, epsilon)
            torch.mul(a * r[block], w, out=out[block])
        ctx.save_for_backward(x, weight, r)
        return out.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, r = ctx.saved_tensors
        wide, width = r.dtype, x.shape[-1]
        rows, dy_rows, w = x.reshape(-1, 1, width), dy.reshape(-1, 1, width), weight.to(wide).unsqueeze(0)
        r = r.unsqueeze(-1)
        dx = torch.empty_like(rows)
        d_weight = torch.zeros_like(w)
        for block in _cut_rows(rows.shape[0], width):
            n = rows[block].to(wide) * r[block]
            out = dx[block] if dx.dtype == wide else torch.empty_like(n)
            _normalize_backward(dy_rows[block].to(wide), n, r[block], w, out, d_weight)
            if dx.dtype != wide:
                dx[block] = out
        return dx.view(x.shape), d_weight[0].to(weight.dtype), None


class _GatedRmsNorm(torch.autograd.Function):
    """Saves y, z and one number a row and group."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, z: Tensor, weight: Tensor, epsilon: float, num_groups: int) -> Tensor:
        wide, width = _wide(y), y.shape[-1]
        shape = (-1, num_groups, width // num_groups)
        y_rows, z_rows, w = y.reshape(shape), z.reshape(shape), weight.to(wide).view(shape[1:])
        out = torch.empty_like(y_rows)
        r = torch.empty(y_rows.shape[0], num_groups, 1, dtype=wide, device=y.device)
        for block in _cut_rows(y_rows.shape[0], width):
            a = F.silu(z_rows[block].to(wide)).mul_(y_rows[block])
            r[block] = _reciprocal_rms(a, epsilon)
            torch.mul(a.mul_(r[block]), w, out=out[block])
        ctx.save_for_backward(y, z, weight, r)
        ctx.num_groups = num_groups
        return out.view(y.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        y, z, weight, r = ctx.saved_tensors
        wide, width = r.dtype, y.shape[-1]
        shape = (-1, ctx.num_groups, width // ctx.num_groups)
        y_rows, z_rows, do_rows = y.reshape(shape), z.reshape(shape), d_out.reshape(shape)
        w = weight.to(wide).view(shape[1:])
        dy, dz = torch.empty_like(y_rows), torch.empty_like(z_rows)
        d_weight = torch.zeros_like(w)
        for block in _cut_rows(y_rows.shape[0], width):
            y_block, z_block = y_rows[block].to(wide), z_rows[block].to(wide)
            gate = F.silu(z_block)
            n = (gate * y_block).mul_(r[block])
            da = torch.empty_like(n)
            _normalize_backward(do_rows[block].to(wide), n, r[block], w, da, d_weight)
            torch.mul(gate, da, out=dy[block])
            da.mul_(y_block)
            if dz.dtype == wide:
                torch.ops.aten.silu_backward.grad_input(da, z_block, grad_input=dz[block])
            else:
                dz[block] = torch.ops.aten.silu_backward(da, z_block)
        return dy.view(y.shape), dz.view(z.shape), d_weight.flatten().to(weight.dtype), None, None
