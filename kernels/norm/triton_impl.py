"""The Triton norms as operations that autograd, torch.compile and meta tensors know.

One custom operation serves the plain norm, the norm of a sum, and the gated norm: `other` is the residual or
the gate. Forward saves r, one float32 per row and group; backward recomputes the rest from inputs that are kept
for other reasons. Weight gradients are summed by each program over its rows and then over programs, in a fixed
order, instead of by atomics. `norm_rows` and `norm_rows_backward` launch the kernels, for the operation that is
Mamba2's mixer too (`kernels/mamba2`).

Norms as Triton kernels: one pass over memory each way, one number per row saved.
"""

# Triton reads a kernel's parameters from the call: they carry no types.
# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: ANN201, ANN202

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from amfm.kernels.common.custom_op import fake_of, gradients_like
from amfm.kernels.common.inputs import pack_inner, stride_unit
from amfm.kernels.common.silu import sigmoid, silu, silu_backward
from amfm.kernels.common.tiles import sum_first
from amfm.kernels.runtime.interpreter import count_programs, dot_dtype


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


# A program holds whole rows of a group on chip.
LARGEST_GROUP = 32768
# Values of one tile, and values a warp takes.
TILE_VALUES, WARP_VALUES = 4096, 1024


def rms_norm_triton(x: Tensor, weight: Tensor, epsilon: float, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """(norm of h, h) with h = x + residual; without a residual the second is x. float32, bfloat16 or float16."""
    _check(x, x.shape[-1])
    if residual is None:
        return _norm(x, None, weight, epsilon, 1, False)[0], x
    y, h, _ = _norm(x, residual, weight, epsilon, 1, False)
    return y, h


def gated_rms_norm_triton(y: Tensor, z: Tensor, weight: Tensor, epsilon: float, num_groups: int) -> Tensor:
    """As `reference.normalize_gated`, for float32, bfloat16 and float16."""
    _check(y, y.shape[-1] // num_groups)
    return _norm(y, z, weight, epsilon, num_groups, True)[0]


def layer_norm_triton(
    x: Tensor, weight: Tensor, bias: Tensor, epsilon: float, residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(LayerNorm of h, h) with h = x + residual, as `rms_norm_triton`."""
    _check(x, x.shape[-1])
    y, h, _ = _layer_norm(x, residual, weight, bias, epsilon)
    return y, x if residual is None else h


def _check(x: Tensor, size: int) -> None:
    """Reject float64 and groups wider than LARGEST_GROUP.

    A group must fit one program's registers, because its mean is needed before any of its values can be
    written.
    """
    dot_dtype(x.dtype)  # rejects float64
    if size > LARGEST_GROUP:
        raise ValueError(f'backend "triton" norms groups of up to {LARGEST_GROUP} values; got {size}')


def _flat(x: Tensor) -> Tensor:
    """View a tensor as [rows, D] with packed columns; rows may be apart."""
    return pack_inner(x.reshape(-1, x.shape[-1]))


def _tile(size: int, rows: int) -> dict[str, int]:
    """Columns (a power of two that holds the group), rows and warps of a program.

    Rows of narrow groups share a program, up to TILE_VALUES values; a warp for WARP_VALUES values leaves 32 to
    each thread.
    """
    block = max(2, triton.next_power_of_2(size))
    block_rows = max(1, min(TILE_VALUES // block, triton.next_power_of_2(rows)))
    return {"BLOCK_S": block, "BLOCK_R": block_rows, "num_warps": max(1, min(16, block * block_rows // WARP_VALUES))}


@torch.library.custom_op("amfm::rms_norm_triton", mutates_args=())
def _norm(
    x: Tensor, other: Tensor | None, weight: Tensor, epsilon: float, num_groups: int, gated: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The normed values, x + other (empty unless that is what is normed), and r [rows, groups]."""
    return norm_rows(x, other, weight, epsilon, num_groups, gated=gated)


@fake_of(_norm)
def _(given: Any) -> tuple[Tensor, ...]:
    x = given.x
    h = x.new_empty(x.shape if given.other is not None and not given.gated else (0,))
    return x.new_empty(x.shape), h, x.new_empty(x.numel() // x.shape[-1], given.num_groups, dtype=torch.float32)


def norm_rows(
    x: Tensor,
    other: Tensor | None,
    weight: Tensor,
    epsilon: float,
    num_groups: int,
    *,
    gated: bool,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the forward kernel: what `_norm` returns. Rows of x [..., D] and of `other` may be apart. bias: LayerNorm's."""
    flat, weight = _flat(x), weight.contiguous()
    second = None if other is None else _flat(other)
    rows, width = flat.shape
    size = width // num_groups
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    residual = other is not None and not gated
    h = torch.empty(x.shape if residual else (0,), dtype=x.dtype, device=x.device)
    reciprocal = torch.empty(rows, num_groups, dtype=torch.float32, device=x.device)
    stride = 0 if second is None else second.stride(0)
    unit = stride_unit(stride)
    if rows:
        tile = _tile(size, rows)
        norm_forward_kernel[(triton.cdiv(rows, tile["BLOCK_R"]), num_groups)](
            flat, second, weight, None if bias is None else bias.contiguous(), out, h, reciprocal, rows, size,
            flat.stride(0), stride // unit, epsilon,
            GATED=gated, RESIDUAL=residual, CENTERED=bias is not None, UNIT=unit, **tile,
        )  # fmt: skip
    return out, h, reciprocal


@torch.library.custom_op("amfm::rms_norm_triton_backward", mutates_args=())
def _norm_backward(
    d_out: Tensor, d_h: Tensor | None, x: Tensor, z: Tensor | None, weight: Tensor, reciprocal: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the normed sum or of the gated values, of z (empty without), and of the weight."""
    d_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    d_z = torch.empty((0,) if z is None else z.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return d_x, d_z, torch.zeros_like(weight)
    return d_x, d_z, norm_rows_backward(d_out, d_h, x, z, weight, reciprocal, d_x, d_z, None)


def norm_rows_backward(
    d_out: Tensor,
    d_h: Tensor | None,
    x: Tensor,
    z: Tensor | None,
    weight: Tensor,
    reciprocal: Tensor,
    d_x: Tensor,
    d_z: Tensor,
    out: Tensor | None,
    d_bias: Tensor | None = None,
) -> Tensor:
    """Launch the backward kernel on one row at least: write d_x, d_z (rows of which may be apart) and, if given, out and d_bias.

    Returns the gradient of the weight.
    """
    flat, d_out, weight = _flat(x), d_out.contiguous(), weight.contiguous()
    second = None if z is None else _flat(z)
    d_h = None if d_h is None else d_h.contiguous()
    rows, width = flat.shape
    groups = reciprocal.shape[1]
    tile = _tile(width // groups, rows)
    if out is not None and tile["BLOCK_S"] == TILE_VALUES:  # the normed values next to four others of 32 a thread spill
        tile["num_warps"] *= 2
    strides = (0, 0) if second is None else (second.stride(0), d_z.view(rows, width).stride(0))
    unit = stride_unit(*strides)
    # Few programs that walk many blocks each: every program writes one partial of the weight's gradient.
    programs = max(1, min(triton.cdiv(rows, tile["BLOCK_R"]), count_programs(x.device) // groups))
    partial = torch.empty(programs, width, dtype=torch.float32, device=x.device)
    partial_bias = None if d_bias is None else torch.empty_like(partial)
    norm_backward_kernel[(programs, groups)](
        flat, second, weight, reciprocal, d_out, d_h, d_x, d_z, out, partial, partial_bias, rows, width // groups,
        flat.stride(0), *(stride // unit for stride in strides), GATED=z is not None, D_H=d_h is not None,
        OUT=out is not None, CENTERED=d_bias is not None, UNIT=unit, **tile,
    )  # fmt: skip
    if d_bias is not None and partial_bias is not None:
        d_bias.copy_(sum_first(partial_bias, d_bias.dtype))
    return sum_first(partial, weight.dtype)


gradients_like(_norm_backward, ("x", "z", "weight"))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    """Keep what was normed (h where a residual was added, which the caller keeps too), the gate, the weight and r."""
    x, other, weight, _, _, gated = inputs
    _, h, reciprocal = output
    ctx.residual = other is not None and not gated
    ctx.save_for_backward(h if ctx.residual else x, other if gated else None, weight, reciprocal)
    ctx.mark_non_differentiable(reciprocal)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, d_out: Tensor | None, d_h: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of x, of the residual or gate, and of the weight.

    The residual's is that of x, because both entered as a sum.
    """
    x, z, weight, reciprocal = ctx.saved_tensors
    if d_out is None:
        d_out = torch.zeros_like(x)
    d_x, d_z, d_weight = _norm_backward(d_out, d_h if ctx.residual else None, x, z, weight, reciprocal)
    d_other = d_x if ctx.residual else d_z if z is not None else None
    return d_x, d_other, d_weight, None, None, None


_norm.register_autograd(_differentiate, setup_context=_save)


@torch.library.custom_op("amfm::layer_norm_triton", mutates_args=())
def _layer_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The normed values, x + residual (empty without), and r [rows, 1]."""
    return norm_rows(x, residual, weight, epsilon, 1, gated=False, bias=bias)


@fake_of(_layer_norm)
def _(given: Any) -> tuple[Tensor, ...]:
    x = given.x
    h = x.new_empty(x.shape if given.residual is not None else (0,))
    return x.new_empty(x.shape), h, x.new_empty(x.numel() // x.shape[-1], 1, dtype=torch.float32)


@torch.library.custom_op("amfm::layer_norm_triton_backward", mutates_args=())
def _layer_norm_backward(
    d_out: Tensor, d_h: Tensor | None, x: Tensor, weight: Tensor, bias: Tensor, reciprocal: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the normed sum, of the weight and of the bias."""
    d_x, d_bias = torch.empty(x.shape, dtype=x.dtype, device=x.device), torch.zeros_like(bias)
    if x.numel() == 0:
        return d_x, torch.zeros_like(weight), d_bias
    none = x.new_empty(0)
    return d_x, norm_rows_backward(d_out, d_h, x, None, weight, reciprocal, d_x, none, None, d_bias), d_bias


gradients_like(_layer_norm_backward, ("x", "weight", "bias"))


def _save_centered(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    """Keep what was normed, the weights and r."""
    x, residual, weight, bias, _ = inputs
    _, h, reciprocal = output
    ctx.residual = residual is not None
    ctx.save_for_backward(h if ctx.residual else x, weight, bias, reciprocal)
    ctx.mark_non_differentiable(reciprocal)
    ctx.set_materialize_grads(False)


def _differentiate_centered(
    ctx: Any, d_out: Tensor | None, d_h: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Gradients of x, of the residual, which is the same, of the weight and of the bias."""
    x, weight, bias, reciprocal = ctx.saved_tensors
    d_out = torch.zeros_like(x) if d_out is None else d_out
    d_x, d_weight, d_bias = _layer_norm_backward(d_out, d_h if ctx.residual else None, x, weight, bias, reciprocal)
    return d_x, d_x if ctx.residual else None, d_weight, d_bias, None


_layer_norm.register_autograd(_differentiate_centered, setup_context=_save_centered)
