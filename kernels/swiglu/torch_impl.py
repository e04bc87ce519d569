"""Activations in PyTorch, with backward written out so that only the input is kept.

Autograd by itself would keep gate, up and silu(gate); the Functions here keep their input alone and write both
gradients into one tensor, where the product behind them reads it. Computation is float32 (float64 for float64),
and each result is rounded once.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from amfm.kernels.swiglu.gate import SWIGLU, Gate


def _wide(tensor: Tensor) -> Tensor:
    """The tensor in float32, or in float64 where it is that."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class _SwiGLU(torch.autograd.Function):
    """silu(gate) * up with its gradient; saves the input [..., 2F]. For units without a limit, alpha and shift."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(_wide(gate)).mul_(up).to(gate_up.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        gate, d_y = _wide(gate), grads[0]
        d_gate_up = torch.empty_like(gate_up)
        # Views: both gradients are written where they stay, without a concatenation.
        d_gate, d_up = d_gate_up.chunk(2, dim=-1)
        d_gate.copy_(torch.ops.aten.silu_backward(_wide(d_y) * up, gate))
        d_up.copy_(F.silu(gate).mul_(d_y))
        return d_gate_up


class _LimitedSwiGLU(torch.autograd.Function):
    """Any unit with its gradient, which is zero where a limit holds; saves the input [..., 2F]."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, unit: Gate) -> Tensor:
        ctx.save_for_backward(gate_up)
        ctx.unit = unit
        return _compose(gate_up, unit)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (gate_up,) = ctx.saved_tensors
        unit: Gate = ctx.unit
        raw_gate, raw_up = (_wide(half) for half in gate_up.chunk(2, dim=-1))
        (gate, up), d_y = unit.limited(raw_gate, raw_up), _wide(grads[0])
        steep = unit.steep(gate)
        d_gate = torch.ops.aten.silu_backward(d_y * up, steep)
        d_up = d_y * F.silu(steep) / unit.alpha
        if unit.limit is not None:
            d_gate = d_gate.masked_fill_(raw_gate > unit.limit, 0)
            d_up = d_up.masked_fill_(raw_up.abs() > unit.limit, 0)
        return torch.cat([d_gate, d_up], dim=-1).to(gate_up.dtype), None


def _compose(gate_up: Tensor, unit: Gate) -> Tensor:
    """A unit of wide numbers, rounded once."""
    gate, up = unit.limited(*(_wide(half) for half in gate_up.chunk(2, dim=-1)))
    return (F.silu(unit.steep(gate)) / unit.alpha * up).to(gate_up.dtype)


class _SquaredReLU(torch.autograd.Function):
    """max(x, 0)^2 with gradient 2 max(x, 0) dy; saves the input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return F.relu(_wide(x)).square_().to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return F.relu(_wide(x)).mul(2).mul_(grads[0]).to(x.dtype)


def swiglu_torch(gate_up: Tensor, unit: Gate = SWIGLU) -> Tensor:
    """As `swiglu_reference`, in float32 inside. A compiler fuses the plain composition better than the Function."""
    if unit != SWIGLU:
        return _compose(gate_up, unit) if torch.compiler.is_compiling() else _LimitedSwiGLU.apply(gate_up, unit)
    if torch.compiler.is_compiling():
        gate, up = gate_up.chunk(2, dim=-1)
        return (F.silu(_wide(gate)) * up).to(gate_up.dtype)
    return _SwiGLU.apply(gate_up)


def squared_relu_torch(x: Tensor) -> Tensor:
    """As `squared_relu_reference`, in float32 inside."""
    if torch.compiler.is_compiling():
        return F.relu(_wide(x)).square().to(x.dtype)
    return _SquaredReLU.apply(x)
