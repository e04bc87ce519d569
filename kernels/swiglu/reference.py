"""Activations written out as their formulas."""

from __future__ import annotations

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
    return gate / (1 + torch.exp(-unit.alpha * gate * (1 + unit.cubic * gate**2))) * (up + unit.shift)


def squared_relu_reference(x: Tensor) -> Tensor:
    """max(x, 0)^2.

    Elementwise in the input's dtype; source: So et al. 2021 (arXiv 2109.08668), section 3.
    """
    return x.clamp(min=0) ** 2
