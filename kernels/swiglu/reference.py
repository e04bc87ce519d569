"""Activations written out as their formulas."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from amfm.kernels.swiglu.gate import SWIGLU, Gate


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
