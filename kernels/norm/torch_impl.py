"""Root-mean-square norms with PyTorch and a hand-written backward; plain compositions for the compiler.

With a the normed input, r = 1 / sqrt(mean(a^2) + epsilon), n = a r and output n w:
d_a = r (dy w - n mean(dy w n)) and dw = sum over rows of dy n.

Each pass works on blocks of about 1 MiB of float32 a thread and reuses one scratch buffer: whole-tensor
operations would write and read every intermediate through memory. Under torch.compile the plain formula runs
instead, which Inductor fuses to the same effect.

`normalize` and `normalize_gated` are the formulas, in any dtype: what every other form is compared with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def normalize(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x / sqrt(mean(x^2) + epsilon) * weight over the last dim (Zhang and Sennrich 2019, arXiv 1910.07467)."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon) * weight


def normalize_gated(y: Tensor, z: Tensor, weight: Tensor, epsilon: float, num_groups: int) -> Tensor:
    """The norm of y silu(z) over each of `num_groups` equal parts of the last dim."""
    gated = (y * F.silu(z)).unflatten(-1, (num_groups, -1))
    return normalize(gated, weight.unflatten(0, (num_groups, -1)), epsilon).flatten(-2)


# Values of one intermediate tensor in a block, for each thread: 1 MiB of float32.
_BLOCK_VALUES = 262144


def rms_norm_torch(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """`rms_norm` without a residual.

    x [..., D], weight [D] -> [..., D] in the dtype of x; sums are float32 (float64 for float64).
    """
    if torch.compiler.is_compiling():
        wide = _wide(x)
        return normalize(x.to(wide), weight.to(wide), epsilon).to(x.dtype)
    return _RmsNorm.apply(x, weight, epsilon)


def gated_rms_norm_torch(y: Tensor, z: Tensor, weight: Tensor, epsilon: float, num_groups: int) -> Tensor:
    """`gated_rms_norm`.

    y and z [..., D], weight [D] -> [..., D] in the dtype of y; sums are float32 (float64 for float64).
    """
    if torch.compiler.is_compiling():
        wide = _wide(y)
        return normalize_gated(y.to(wide), z.to(wide), weight.to(wide), epsilon, num_groups).to(y.dtype)
    return _GatedRmsNorm.apply(y, z, weight, epsilon, num_groups)


def _wide(x: Tensor) -> torch.dtype:
    """Dtype of sums: float32, or float64 for float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _reciprocal_rms(a: Tensor, epsilon: Tensor, r: Tensor) -> Tensor:
    """1 / sqrt(mean(a^2) + epsilon) over the last dim, into `r`.

    By the vector norm, which reads `a` once and makes no tensor of squares. `epsilon` is a tensor of no
    dimension because addcmul takes no scalar there.
    """
    torch.linalg.vector_norm(a, dim=-1, keepdim=True, out=r)
    return torch.addcmul(epsilon, r, r, value=1 / a.shape[-1], out=r).rsqrt_()


def _cut_rows(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Blocks of rows [R, G, size] whose intermediate values stay near a core, instead of passing through memory."""
    step = _block_rows(tensors[0])
    return zip(*(tensor.split(step) for tensor in tensors), strict=True)


def _make_scratch(count: int, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Room for `count` intermediate tensors of a block [count, block, G, size], which all blocks use in turn."""
    return rows.new_empty(count, min(_block_rows(rows), rows.shape[0]), *rows.shape[1:], dtype=dtype)


def _block_rows(rows: Tensor) -> int:
    """Rows of a block of [rows, G, size]: what keeps one intermediate tensor near `_BLOCK_VALUES` a thread."""
    return max(1, _BLOCK_VALUES * torch.get_num_threads() // (rows.shape[1] * rows.shape[2]))


def _normalize_backward(do: Tensor, a: Tensor, r: Tensor, weight: Tensor, out: Tensor, d_weight: Tensor) -> None:
    """Gradient of the normed input `a` into `out`; adds to d_weight. Rows [rows, G, size], weight [G, size].

    `out` doubles as scratch for do * a, so that the weight's gradient, r (do a) summed over rows, is one
    batched product a group.
    """
    torch.mul(do, a, out=out)
    d_weight.unsqueeze(1).baddbmm_(r.permute(1, 2, 0), out.transpose(0, 1))
    mean = out.mul_(weight).sum(-1, keepdim=True).mul_(r).mul_(r)
    torch.mul(do, weight, out=out).addcmul_(a, mean, value=-1.0 / a.shape[-1]).mul_(r)


class _RmsNorm(torch.autograd.Function):
    """Saves x and one number per row.

    That number is r = 1 / rms; the normed rows are made again in backward.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        wide = _wide(x)
        rows, w = x.reshape(-1, 1, x.shape[-1]), weight.to(wide)
        out = torch.empty_like(rows)
        r = rows.new_empty(rows.shape[0], 1, 1, dtype=wide)
        scratch, epsilon_ = _make_scratch(1, rows, wide), r.new_full((), epsilon)
        for x_block, r_block, out_block in _cut_rows(rows, r, out):
            n = scratch[0, : len(x_block)]
            a = x_block if x_block.dtype == wide else n.copy_(x_block)
            torch.mul(a, _reciprocal_rms(a, epsilon_, r_block), out=n)
            # A narrow result is rounded once, from the float32 product with the weight.
            if out.dtype == wide:
                torch.mul(n, w, out=out_block)
            else:
                out_block.copy_(n.mul_(w))
        ctx.save_for_backward(x, weight, r)
        return out.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, r = ctx.saved_tensors
        wide, width = r.dtype, x.shape[-1]
        rows, dy_rows, w = x.reshape(-1, 1, width), dy.reshape(-1, 1, width), weight.to(wide).unsqueeze(0)
        dx, d_weight = torch.empty_like(rows), torch.zeros_like(w)
        narrow = x.dtype != wide
        scratch = _make_scratch(3 if narrow else 0, rows, wide)
        for x_block, dy_block, r_block, dx_block in _cut_rows(rows, dy_rows, r, dx):
            if narrow:
                a, do, da = scratch[:, : len(x_block)]
                _normalize_backward(do.copy_(dy_block), a.copy_(x_block), r_block, w, da, d_weight)
                dx_block.copy_(da)
            else:
                _normalize_backward(dy_block, x_block, r_block, w, dx_block, d_weight)
        return dx.view(x.shape), d_weight[0].to(weight.dtype), None


class _GatedRmsNorm(torch.autograd.Function):
    """Saves y, z and one number per row and group.

    Groups are a dimension of rows, [rows, G, size], so that the plain norm's helpers serve both.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, z: Tensor, weight: Tensor, epsilon: float, num_groups: int) -> Tensor:
        wide, shape = _wide(y), (-1, num_groups, y.shape[-1] // num_groups)
        y_rows, z_rows, w = y.reshape(shape), z.reshape(shape), weight.to(wide).view(shape[1:])
        out = torch.empty_like(y_rows)
        r = y_rows.new_empty(y_rows.shape[0], num_groups, 1, dtype=wide)
        narrow, epsilon_ = out.dtype != wide, r.new_full((), epsilon)
        scratch = _make_scratch(2 if narrow else 0, y_rows, wide)
        for y_block, z_block, r_block, out_block in _cut_rows(y_rows, z_rows, r, out):
            # In the wide dtype the gated values are made where the result will stand.
            a, *widened = scratch[:, : len(y_block)] if narrow else (out_block,)
            torch.ops.aten.silu.out(widened[0].copy_(z_block) if narrow else z_block, out=a)
            a.mul_(widened[0].copy_(y_block) if narrow else y_block)
            a.mul_(_reciprocal_rms(a, epsilon_, r_block)).mul_(w)
            if narrow:
                out_block.copy_(a)
        ctx.save_for_backward(y, z, weight, r)
        ctx.num_groups = num_groups
        return out.view(y.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        y, z, weight, r = ctx.saved_tensors
        wide, shape = r.dtype, (-1, ctx.num_groups, y.shape[-1] // ctx.num_groups)
        y_rows, z_rows, do_rows = y.reshape(shape), z.reshape(shape), d_out.reshape(shape)
        w = weight.to(wide).view(shape[1:])
        dy, dz, d_weight = torch.empty_like(y_rows), torch.empty_like(z_rows), torch.zeros_like(w)
        narrow = y.dtype != wide
        scratch, one = _make_scratch(6 if narrow else 2, y_rows, wide), r.new_ones(())
        for y_block, z_block, do, r_block, dy_block, dz_block in _cut_rows(y_rows, z_rows, do_rows, r, dy, dz):
            rooms = [*scratch[:, : len(y_block)]]
            # Results of the wide dtype are made where they stay.
            a, da, gate, sigmoid, *widened = rooms if narrow else [*rooms, dy_block, dz_block]
            if narrow:
                z_block = gate.copy_(z_block)
                y_block, do = widened[0].copy_(y_block), widened[1].copy_(do)
            torch.sigmoid(z_block, out=sigmoid)
            torch.mul(z_block, sigmoid, out=gate)
            torch.mul(gate, y_block, out=a)
            _normalize_backward(do, a, r_block, w, da, d_weight)
            # silu' = sigmoid + silu (1 - sigmoid)
            torch.lerp(gate, one, sigmoid, out=sigmoid).mul_(y_block).mul_(da)
            gate.mul_(da)
            if narrow:
                dy_block.copy_(gate)
                dz_block.copy_(sigmoid)
        return dy.view(y.shape), dz.view(z.shape), d_weight.flatten().to(weight.dtype), None, None
