"""A gate on the output of attention heads (Qiu et al. 2025, arXiv 2505.06708, section 2.2).

sigmoid of a projection of the stream, one number a head or one per element. Softmax weights sum to 1, so a head without
a gate cannot add nothing; with it, it can. Shared by attention, window and latent attention.
"""

from __future__ import annotations

import torch
from torch import Tensor

from amfm.model.config.options import OutputGate
from amfm.model.parallel.groups import ProcessGroupCollection
from amfm.model.parallel.layers import ColumnLinear


def gate_projection(
    kind: OutputGate, hidden_size: int, num_heads: int, head_dim: int, groups: ProcessGroupCollection, *, name: str
) -> ColumnLinear | None:
    """Build the projection to gates, one per element of each head or one per head, cut by heads; None without gates."""
    if kind == "none":
        return None
    rows = num_heads * (head_dim if kind == "element" else 1)
    return ColumnLinear(hidden_size, (rows,), groups, name=name, units=(num_heads,))


def gate_heads(o_BTHK: Tensor, gate_BTX: Tensor) -> Tensor:
    """Multiply o [B, T, H, K] by sigmoid(gate), of which each head has K numbers or one: [B, T, H K] or [B, T, H]."""
    return o_BTHK * torch.sigmoid(gate_BTX).unflatten(-1, (o_BTHK.shape[2], -1))
