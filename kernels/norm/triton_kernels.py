"""Norms as Triton kernels: one pass over memory each way, one number per row saved."""

# Triton reads a kernel's parameters from the call: they carry no types.
# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: ANN201, ANN202

from __future__ import annotations

import triton
import triton.language as tl

from amfm.kernels.common.silu import sigmoid, silu, silu_backward


@triton.jit
def _load(x, row, stride, place, inside):
    """Values of x at rows and columns `place`, in float32, zeros outside; `stride` is the distance of rows."""
    return tl.load(x + row * stride + place, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _center(a, size, inside):
    """Values less the mean of their row, zeros outside."""
    return tl.where(inside, a - (tl.sum(a, axis=1) / size)[:, None], 0.0)


@triton.jit
def norm_forward_kernel(
    x, other, weight, bias, out, h, reciprocal, rows, size, stride_x, stride_other, epsilon,
    GATED: tl.constexpr, RESIDUAL: tl.constexpr, CENTERED: tl.constexpr, UNIT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """out = a r w over groups of `size` columns; a is x, x + other (stored in h), or x silu(other).

    Rows of `other` are `stride_other` times UNIT apart. CENTERED: LayerNorm, a less its mean, plus a bias.

    One program per block of rows and a group; reciprocal [rows, groups] receives r.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    group, groups = tl.program_id(1), tl.num_programs(1)
    lane = tl.arange(0, BLOCK_S)[None, :]
    place = group * size + lane
    inside = (row < rows) & (lane < size)
    stride_other = stride_other * UNIT
    a = _load(x, row, stride_x, place, inside)
    if RESIDUAL:
        a = a + _load(other, row, stride_other, place, inside)
        # Normed after rounding, as the other backends do: backward starts from the stored h.
        rounded = a.to(h.dtype.element_ty)
        tl.store(h + row * groups * size + place, rounded, mask=inside)
        a = rounded.to(tl.float32)
    if GATED:
        z = _load(other, row, stride_other, place, inside)
        a = a * silu(z)
    if CENTERED:
        a = _center(a, size, inside)
    # [BLOCK_R, 1]; lanes beyond the group are zeros and add nothing.
    r = tl.rsqrt(tl.sum(a * a, axis=1) / size + epsilon)[:, None]
    w = tl.load(weight + place, mask=lane < size, other=0.0).to(tl.float32)
    y = a * r * w
    if CENTERED:
        y = y + tl.load(bias + place, mask=lane < size, other=0.0).to(tl.float32)
    tl.store(out + row * groups * size + place, y.to(out.dtype.element_ty), mask=inside)
    tl.store(reciprocal + row * groups + group, r, mask=row < rows)


@triton.jit
def norm_backward_kernel(
    x, z, weight, reciprocal, d_out, d_h, d_x, d_z, out, partial, partial_bias, rows, size, stride_x, stride_z,
    stride_dz, GATED: tl.constexpr, D_H: tl.constexpr, OUT: tl.constexpr, CENTERED: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """d_x and d_z [rows, groups * size], and one partial d_weight [programs, groups * size] a program.

    Each program walks blocks of rows of one group. d_h is added to d_x where the normed sum is an output too. Rows of d_z
    are `stride_dz` apart, and both strides of z are in multiples of UNIT. With OUT the norm's output is written again, for a
    product that did not keep it.

    CENTERED: LayerNorm, whose bias has its partials too, and whose da is less its mean.

    With n = a r: da = r (w d_out - n mean(w d_out n)), d_weight = sum over rows of d_out n.
    """
    group, groups = tl.program_id(1), tl.num_programs(1)
    lane = tl.arange(0, BLOCK_S)[None, :]
    place = group * size + lane
    w = tl.load(weight + place, mask=lane < size, other=0.0).to(tl.float32)
    d_w = tl.zeros((1, BLOCK_S), tl.float32)
    d_b = tl.zeros((1, BLOCK_S), tl.float32)
    stride_z, stride_dz = stride_z * UNIT, stride_dz * UNIT
    for block in range(tl.program_id(0), tl.cdiv(rows, BLOCK_R), tl.num_programs(0)):
        row = tl.cast(block, tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
        inside = (row < rows) & (lane < size)
        where = row * groups * size + place
        a = _load(x, row, stride_x, place, inside)
        if GATED:
            y = a
            gate = _load(z, row, stride_z, place, inside)
            share = sigmoid(gate)
            a = y * gate * share
        if CENTERED:
            a = _center(a, size, inside)
        r = tl.load(reciprocal + row * groups + group, mask=row < rows, other=0.0)
        d = tl.load(d_out + where, mask=inside, other=0.0).to(tl.float32)
        n = a * r
        # Before the product with the weight: the weight's gradient does not hold the weight.
        d_w += tl.sum(d * n, axis=0)[None, :]
        if CENTERED:
            d_b += tl.sum(d, axis=0)[None, :]
        if OUT:
            tl.store(out + where, (n * w).to(out.dtype.element_ty), mask=inside)
        d = d * w
        da = (d - n * (tl.sum(d * n, axis=1) / size)[:, None]) * r
        if CENTERED:
            da = _center(da, size, inside)
        if GATED:
            dz = silu_backward(da * y, gate, share)
            # Packed but where the output is asked for: one place for d_x and d_z spares registers.
            into = row * stride_dz + place if OUT else where
            tl.store(d_z + into, dz.to(d_z.dtype.element_ty), mask=inside)
            da = da * gate * share
        if D_H:
            da += tl.load(d_h + where, mask=inside, other=0.0).to(tl.float32)
        tl.store(d_x + where, da.to(d_x.dtype.element_ty), mask=inside)
    tl.store(partial + tl.program_id(0) * groups * size + place, d_w, mask=lane < size)
    if CENTERED:
        tl.store(partial_bias + tl.program_id(0) * groups * size + place, d_b, mask=lane < size)
