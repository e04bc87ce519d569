"""Activations written out as their formulas."""

from __future__ import annotations

import torch
from torch import Tensor


def swiglu_reference(gate_up: Tensor) -> Tensor:
    """gate * sigmoid(gate) * up, element by element.

    [..., 2F] -> [..., F] in the input's dtype; source: Shazeer 2020 (arXiv 2002.05202), section 2.
    """
    half = gate_up.shape[-1] // 2
    gate, up = gate_up[..., :half], gate_up[..., half:]
    return gate / (1 + torch.exp(-gate)) * up


def squared_relu_reference(x: Tensor) -> Tensor:
    """max(x, 0)^2.

    Elementwise in the input's dtype; source: So et al. 2021 (arXiv 2109.08668), section 3.
    """
    return x.clamp(min=0) ** 2
