"""Causal depthwise convolution with SiLU, one token at a time: the definition that every other form is compared
with.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def convolve_by_steps(
    x_BTC: Tensor,
    weight_CW: Tensor,
    bias_C: Tensor | None,
    document_ids_BT: Tensor | None,
    initial_window_BWC: Tensor | None,
    *,
    silu: bool = True,
) -> Tensor:
    """y_t = silu(bias + sum_w weight_w x_(t-W+1+w)) over the inputs of the token's own document; missing ones are 0.

    x [B, T, C], weight [C, W], bias [C] or None, initial window [B, W - 1, C] (the inputs before the row, of
    the document of its first token) -> [B, T, C], in the dtype of x. For tests: a Python step for each token
    and tap.
    """
    B, T, C = x_BTC.shape
    W = weight_CW.shape[1]
    outputs = []
    for t in range(T):
        total = x_BTC.new_zeros(B, C) if bias_C is None else bias_C.expand(B, C)
        for w in range(W):
            source = t - (W - 1) + w
            if source >= 0:
                value, document = x_BTC[:, source], source
            elif initial_window_BWC is not None:
                # The window belongs to the document of the row's first token.
                value, document = initial_window_BWC[:, source + W - 1], 0
            else:
                continue
            if document_ids_BT is not None:
                own = (document_ids_BT[:, document] == document_ids_BT[:, t])[:, None]
                value = torch.where(own, value, torch.zeros_like(value))
            total = total + weight_CW[:, w] * value
        outputs.append(F.silu(total) if silu else total)
    return torch.stack(outputs, dim=1)
