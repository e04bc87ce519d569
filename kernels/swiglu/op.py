"""Activations of feed-forward layers: gated units such as SwiGLU, the squared ReLU and GELU.

How: all are elementwise, so the cost is memory traffic. Autograd on its own would keep gate, up and silu(gate); the Functions
here keep only their input, and write both gradients into one tensor, where the product after them reads it. Gate and up are
next to each other in one tensor, as one product of the layer before makes them. Computation is float32 (float64 for float64),
and each result is rounded once. `swiglu_reference` and `plain_unit_reference` are the formulas, element by element."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from amfm.kernels.common.inputs import check_float
from amfm.kernels.runtime.backend import resolve_backend
from amfm.kernels.swiglu.gate import GELUS, PLAIN, SWIGLU, Gate, gelu_backward, plain_unit_of


def swiglu(gate_up: Tensor, unit: Gate = SWIGLU, *, backend: str = "auto") -> Tensor:
    """silu(gate) * up, where the last dim of 2F holds gate, then up; or another gated unit of the two.

    Shapes: [..., 2F] -> [..., F], in the input's dtype, computed in float32. Saves only the input.
    Raises ValueError for an odd last dim or a dtype that is not floating point.
    Source: Shazeer 2020 (arXiv 2002.05202), section 2.
    """
    check_float("gate_up", gate_up)
    if gate_up.dim() == 0 or gate_up.shape[-1] % 2:
        raise ValueError(f"gate_up must have an even last dim (gate, then up); got {list(gate_up.shape)}")
    backend = resolve_backend(backend, gate_up.device, "swiglu")
    if backend == "triton":
        from amfm.kernels.swiglu.triton_impl import swiglu_triton

        return swiglu_triton(gate_up, unit)
    return swiglu_torch(gate_up, unit) if backend == "torch" else swiglu_reference(gate_up, unit)


def plain_unit(x: Tensor, activation: str, *, backend: str = "auto") -> Tensor:
    """A unit of one matrix, `gate.PLAIN`, element by element, in the input's dtype, computed in float32. Saves only the input.

    Raises ValueError for a dtype that is not floating point and an activation that is not one of them.
    Sources: So et al. 2021 (arXiv 2109.08668), section 3; Hendrycks and Gimpel 2016 (arXiv 1606.08415), section 2.
    """
    check_float("x", x)
    if activation not in PLAIN:
        raise ValueError(f"activation must be one of {', '.join(PLAIN)}; got {activation!r}")
    backend = resolve_backend(backend, x.device, "swiglu")
    if backend == "triton":
        from amfm.kernels.swiglu.triton_impl import plain_unit_triton

        return plain_unit_triton(x, activation)
    return plain_unit_torch(x, activation) if backend == "torch" else plain_unit_reference(x, activation)


def squared_relu(x: Tensor, *, backend: str = "auto") -> Tensor:
    """max(x, 0)^2 as `plain_unit` computes it."""
    return plain_unit(x, "squared_relu", backend=backend)


def swiglu_bytes(elements: int, size: int, *, backward: bool) -> int:
    """Least bytes for `elements` outputs: gate, up and y; backward reads gate, up, dy and writes both gradients.

    `size` is the bytes of one number.
    """
    return elements * size * (5 if backward else 3)


def squared_relu_bytes(elements: int, size: int, *, backward: bool) -> int:
    """Least bytes: x read, y written; backward reads x and dy and writes dx."""
    return elements * size * (3 if backward else 2)


def swiglu_flops(elements: int, *, backward: bool) -> int:
    """Floating point operations, an exponential counted as one.

    Forward: exponential, sum, division and two products; backward computes the sigmoid again and both
    gradients.
    """
    return elements * (12 if backward else 5)


def swiglu_reference(gate_up: Tensor, unit: Gate = SWIGLU) -> Tensor:
    """gate * sigmoid(alpha gate (1 + cubic gate^2)) * (up + shift), element by element, of limited gate and up.

    [..., 2F] -> [..., F] in the input's dtype; source: Shazeer 2020 (arXiv 2002.05202), section 2.
    """
    half = gate_up.shape[-1] // 2
    gate, up = gate_up[..., :half], gate_up[..., half:]
    if unit.limit is not None:
        gate, up = gate.clamp(max=unit.limit), up.clamp(-unit.limit, unit.limit)
    if not unit.alpha:
        return gate * (1 + torch.erf(gate / math.sqrt(2.0))) / 2 * (up + unit.shift)
    return gate / (1 + torch.exp(-unit.alpha * gate * (1 + unit.cubic * gate**2))) * (up + unit.shift)


def plain_unit_reference(x: Tensor, activation: str) -> Tensor:
    """A unit of `gate.PLAIN`, elementwise in the input's dtype (arXiv 2109.08668, section 3; arXiv 1606.08415, section 2)."""
    if activation == "squared_relu":
        return x.clamp(min=0) ** 2
    tanh = torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3))
    return x * (1 + (torch.erf(x / math.sqrt(2.0)) if activation == "gelu" else tanh)) / 2


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
