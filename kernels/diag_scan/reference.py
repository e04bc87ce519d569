"""The selective scan of Mamba one token at a time, in any dtype: the definition that every other form is compared
with.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def diag_by_steps(
    x_BTC: Tensor,
    dt_BTC: Tensor,
    A_log_CN: Tensor,
    B_BTN: Tensor,
    C_BTN: Tensor,
    D_C: Tensor,
    dt_bias_C: Tensor,
    document_ids_BT: Tensor | None,
    initial_state_BCN: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mamba (Gu and Dao 2023, arXiv 2312.00752, algorithm 2): h_t = e^(dt_t A) h_(t-1) + dt_t x_t B_t, y_t = h_t C_t + D x_t.

    Each channel c has a state of N numbers of its own, zero before the first token of each document; dt goes through
    softplus(dt + dt_bias) and A = -exp(A_log).

    Returns y [B, T, C], the last state [B, C, N], and the factor [B, C, N] by which the initial state enters the last
    one (0 where the row's last token is in another document than its first).

    x and dt [B, T, C], A_log [C, N], B and C [B, T, N], D and dt_bias [C]; all in one dtype, float64 in tests.
    """
    dt_BTC = F.softplus(dt_BTC + dt_bias_C)
    A_CN = -A_log_CN.exp()
    state = x_BTC.new_zeros(x_BTC.shape[0], *A_CN.shape) if initial_state_BCN is None else initial_state_BCN
    total = torch.ones_like(state)
    outputs = []
    for t in range(x_BTC.shape[1]):
        decay = (dt_BTC[:, t, :, None] * A_CN).exp()
        if document_ids_BT is not None and t > 0:
            begins = document_ids_BT[:, t] != document_ids_BT[:, t - 1]
            decay = decay.masked_fill(begins[:, None, None], 0.0)
        state = decay * state + (dt_BTC[:, t] * x_BTC[:, t])[..., None] * B_BTN[:, t, None]
        total = decay * total
        outputs.append((state * C_BTN[:, t, None]).sum(-1) + D_C * x_BTC[:, t])
    return torch.stack(outputs, dim=1), state, total
