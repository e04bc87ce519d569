"""Activations in PyTorch, with backward written out so that only the input is kept.

Autograd on its own would keep gate, up and silu(gate); the Functions here keep only their input and write both
gradients into one tensor, where the product after them reads it. Computation is float32 (float64 for float64),
and each result is rounded once.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from amfm.kernels.swiglu.gate import GELUS, SWIGLU, Gate, gelu_backward, plain_unit_of


def _wide(tensor: Tensor) -> Tensor:
    """The tensor in float32, or in float64 where it is that."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _halves(gate_up: Tensor, unit: Gate) -> tuple[Tensor, Tensor]:
    """Gate and up in float32 at least; up as it is where it is only multiplied, which widens it there."""
    gate, up = gate_up.chunk(2, dim=-1)
    return _wide(gate), up if unit == SWIGLU else _wide(up)


class _GatedUnit(torch.autograd.Function):
    """A gated unit with its gradient, which is zero if a limit holds; saves the input [..., 2F]."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, unit: Gate) -> Tensor:
        ctx.save_for_backward(gate_up)
        ctx.unit = unit
        gate, up = unit.limited(*_halves(gate_up, unit))
        return unit.factor(gate).mul_(up).to(gate_up.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (gate_up,), (d_y,), unit = ctx.saved_tensors, grads, ctx.unit
        raw_gate, raw_up = _halves(gate_up, unit)
        gate, up = unit.limited(raw_gate, raw_up)
        d_gate_up = torch.empty_like(gate_up)
        # Views: both gradients are written where they stay, without a concatenation.
        d_gate, d_up = d_gate_up.chunk(2, dim=-1)
        d_gate.copy_(unit.factor_backward(_wide(d_y) * up, gate))
        d_up.copy_(unit.factor(gate).mul_(d_y))
        unit.pass_limits(d_gate, d_up, raw_gate, raw_up)
        return d_gate_up, None


class _PlainUnit(torch.autograd.Function):
    """max(x, 0)^2 with gradient 2 max(x, 0) dy, or GELU with its; saves the input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(x)
        ctx.activation = activation
        return plain_unit_of(_wide(x), activation).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        if ctx.activation in GELUS:
            return gelu_backward(_wide(grads[0]), _wide(x), GELUS[ctx.activation]).to(x.dtype), None
        return F.relu(_wide(x)).mul(2).mul_(grads[0]).to(x.dtype), None


def swiglu_torch(gate_up: Tensor, unit: Gate = SWIGLU) -> Tensor:
    """As `swiglu_reference`, in float32 inside. A compiler fuses the plain composition better than the Function."""
    if torch.compiler.is_compiling():
        gate, up = unit.limited(*_halves(gate_up, unit))
        return (unit.factor(gate) * up).to(gate_up.dtype)
    return _GatedUnit.apply(gate_up, unit)


def plain_unit_torch(x: Tensor, activation: str) -> Tensor:
    """As `plain_unit_reference`, in float32 inside."""
    if torch.compiler.is_compiling():
        return plain_unit_of(_wide(x), activation).to(x.dtype)
    return _PlainUnit.apply(x, activation)
