"""Activations as Triton kernels: one pass over memory each way, float32 inside.

A launch covers a matrix [R, F] with tiles of rows and columns; a program loads its tile once, computes in
registers and stores the result in the tensor's dtype. Row offsets are 64 bit, because R * 2F passes 2^31 at
128k tokens of a wide layer. There is nothing to tune: the kernels are bound by memory.
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

from amfm.kernels.common.custom_op import differentiate, fake_of
from amfm.kernels.common.silu import (
    limit_gate,
    normal_share,
    normal_slope,
    pass_limit,
    plain_backward,
    plain_unit,
    sigmoid,
    silu_backward,
    steep_silu,
)
from amfm.kernels.runtime.backend import INTERPRETED
from amfm.kernels.runtime.interpreter import dot_dtype
from amfm.kernels.swiglu.gate import PLAIN, SWIGLU, Gate

BLOCK_ROWS, BLOCK_COLUMNS = (16, 64) if INTERPRETED else (4, 1024)


@triton.jit
def _tile(rows, columns, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Row and column numbers of this program's tile, and which of them exist.

    Returns row [BLOCK_R, 1] (int64), column [1, BLOCK_C] and mask [BLOCK_R, BLOCK_C].
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    return row, column, (row < rows) & (column < columns)


@triton.jit
def _steepened(gate, ALPHA: tl.constexpr, CUBIC: tl.constexpr):
    """ALPHA gate (1 + CUBIC gate^2); a CUBIC of 0 costs nothing."""
    steep = ALPHA * gate
    if CUBIC != 0.0:  # the compiler takes conditions of integers only
        steep = steep + steep * CUBIC * gate * gate
    return steep


@triton.jit
def swiglu_forward_kernel(
    gate_up, y, rows, columns,
    ALPHA: tl.constexpr, SHIFT: tl.constexpr, LIMIT: tl.constexpr, CUBIC: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y [R, F] = silu(gate) * up of gate_up [R, 2F], or another unit (`amfm.kernels.swiglu.gate`).

    One program per tile of y; gate stands in the first F columns of a row, up in the last F.
    """
    row, column, inside = _tile(rows, columns, BLOCK_R, BLOCK_C)
    gate_at = gate_up + row * 2 * columns + column
    gate = tl.load(gate_at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_at + columns, mask=inside, other=0.0).to(tl.float32)
    gate, up = limit_gate(gate, up, SHIFT, LIMIT)
    if ALPHA == 0.0:
        result = gate * normal_share(gate) * up
    else:
        result = gate * sigmoid(_steepened(gate, ALPHA, CUBIC)) * up if CUBIC != 0.0 else steep_silu(gate, ALPHA) * up
    tl.store(y + row * columns + column, result.to(y.dtype.element_ty), mask=inside)


@triton.jit
def swiglu_backward_kernel(
    gate_up, d_y, d_gate_up, rows, columns,
    ALPHA: tl.constexpr, SHIFT: tl.constexpr, LIMIT: tl.constexpr, CUBIC: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Gradient [R, 2F] of gate and up.

    d_gate = dy up silu'(gate) and d_up = dy silu(gate), in one pass over gate, up and dy.
    """
    row, column, inside = _tile(rows, columns, BLOCK_R, BLOCK_C)
    place = row * 2 * columns + column
    raw_gate = tl.load(gate_up + place, mask=inside, other=0.0).to(tl.float32)
    raw_up = tl.load(gate_up + place + columns, mask=inside, other=0.0).to(tl.float32)
    gate, up = limit_gate(raw_gate, raw_up, SHIFT, LIMIT)
    grad = tl.load(d_y + row * columns + column, mask=inside, other=0.0).to(tl.float32)
    if ALPHA == 0.0:
        share = normal_share(gate)
        d_gate = grad * up * normal_slope(gate, share)
    else:
        share = sigmoid(_steepened(gate, ALPHA, CUBIC))
        # gate times the slope of what the sigmoid is taken of
        d_gate = silu_backward(grad * up, _steepened(gate, ALPHA, 3.0 * CUBIC), share)
    d_gate = pass_limit(d_gate, raw_gate, LIMIT, False)
    tl.store(d_gate_up + place, d_gate.to(d_gate_up.dtype.element_ty), mask=inside)
    d_up = pass_limit(grad * gate * share, raw_up, LIMIT, True)
    tl.store(d_gate_up + place + columns, d_up.to(d_gate_up.dtype.element_ty), mask=inside)


@triton.jit
def plain_forward_kernel(x, y, rows, columns, ALPHA: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """y = max(x, 0)^2 or GELU of x, [R, F].

    One program per tile.
    """
    row, column, inside = _tile(rows, columns, BLOCK_R, BLOCK_C)
    place = row * columns + column
    value = plain_unit(tl.load(x + place, mask=inside, other=0.0).to(tl.float32), ALPHA)
    tl.store(y + place, value.to(y.dtype.element_ty), mask=inside)


@triton.jit
def plain_backward_kernel(
    x, d_y, d_x, rows, columns, ALPHA: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Gradient of x [R, F] from that of y.

    One program per tile; x is read again.
    """
    row, column, inside = _tile(rows, columns, BLOCK_R, BLOCK_C)
    place = row * columns + column
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(d_y + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(d_x + place, plain_backward(grad, value, ALPHA).to(d_x.dtype.element_ty), mask=inside)


def _launch(kernel: Any, tensors: tuple[Tensor, ...], rows: int, columns: int, **constants: Any) -> None:
    """Cover [rows, columns] with tiles; nothing to do if either is zero."""
    if rows and columns:
        grid = (triton.cdiv(rows, BLOCK_ROWS), triton.cdiv(columns, BLOCK_COLUMNS))
        kernel[grid](*tensors, rows, columns, **constants, BLOCK_R=BLOCK_ROWS, BLOCK_C=BLOCK_COLUMNS)


@torch.library.custom_op("amfm::swiglu_triton", mutates_args=())
def _swiglu(gate_up: Tensor, alpha: float, shift: float, limit: float, cubic: float) -> Tensor:
    """y [..., F] of gate_up [..., 2F]; a limit of 0 is none."""
    gate_up = gate_up.contiguous()
    columns = gate_up.shape[-1] // 2
    y = gate_up.new_empty(*gate_up.shape[:-1], columns)
    constants = {"ALPHA": alpha, "SHIFT": shift, "LIMIT": limit, "CUBIC": cubic}
    _launch(swiglu_forward_kernel, (gate_up, y), gate_up[..., 0].numel(), columns, **constants)
    return y


@fake_of(_swiglu)
def _(given: Any) -> Tensor:
    return given.gate_up.new_empty(*given.gate_up.shape[:-1], given.gate_up.shape[-1] // 2)


@torch.library.custom_op("amfm::swiglu_triton_backward", mutates_args=())
def _swiglu_backward(gate_up: Tensor, d_y: Tensor, alpha: float, shift: float, limit: float, cubic: float) -> Tensor:
    """Gradient of gate_up [..., 2F] from that of y [..., F]."""
    gate_up, d_y = gate_up.contiguous(), d_y.contiguous()
    d_gate_up = torch.empty_like(gate_up)
    rows, columns = gate_up[..., 0].numel(), gate_up.shape[-1] // 2
    constants = {"ALPHA": alpha, "SHIFT": shift, "LIMIT": limit, "CUBIC": cubic}
    _launch(swiglu_backward_kernel, (gate_up, d_y, d_gate_up), rows, columns, **constants)
    return d_gate_up


differentiate(_swiglu, _swiglu_backward, outputs=("y",), gradients=("gate_up",))


@torch.library.custom_op("amfm::plain_unit_triton", mutates_args=())
def _plain(x: Tensor, alpha: float) -> Tensor:
    """A unit of `PLAIN`, by its alpha, of x of any shape."""
    x = x.contiguous()
    y = torch.empty_like(x)
    columns = x.shape[-1] if x.dim() else 1
    _launch(plain_forward_kernel, (x, y), x.numel() // max(columns, 1), columns, ALPHA=alpha)
    return y


@fake_of(_plain)
def _(given: Any) -> Tensor:
    return given.x.new_empty(given.x.shape)


@torch.library.custom_op("amfm::plain_unit_triton_backward", mutates_args=())
def _plain_backward(x: Tensor, d_y: Tensor, alpha: float) -> Tensor:
    """Gradient of x from that of y."""
    x, d_y = x.contiguous(), d_y.contiguous()
    d_x = torch.empty_like(x)
    columns = x.shape[-1] if x.dim() else 1
    _launch(plain_backward_kernel, (x, d_y, d_x), x.numel() // max(columns, 1), columns, ALPHA=alpha)
    return d_x


differentiate(_plain, _plain_backward, outputs=("y",), gradients=("x",))


def swiglu_triton(gate_up: Tensor, unit: Gate = SWIGLU) -> Tensor:
    """As `swiglu_reference`, for float32, bfloat16 and float16."""
    dot_dtype(gate_up.dtype)  # rejects float64
    return _swiglu(gate_up, unit.alpha, unit.shift, unit.limit or 0.0, unit.cubic)


def plain_unit_triton(x: Tensor, activation: str) -> Tensor:
    """As `plain_unit_reference`, for float32, bfloat16 and float16."""
    dot_dtype(x.dtype)
    return _plain(x, PLAIN[activation])
