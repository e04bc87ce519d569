"""Decayed linear attention one token at a time, in any dtype: the definition that every other form is compared with.

The state is carried through a Python loop, in float64 where tests ask for it. It never forms e^(-b) or a sum of
gates, so it has none of the precautions of the chunked forms to get wrong.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def scan_by_steps(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    g: Tensor,
    document_ids_BT: Tensor | None,
    initial_state_BHKV: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """S_t = e^(g_t) S_(t-1) + k_t v_t^T, o_t = S_t^T q_t, with S = 0 before the first token of each document.

    The gate is one number per head, [B, T, H], or one for each key channel (row of the state), [B, T, H, K].

    Returns o [B, T, H, V], the last state [B, H, K, V], and the factor ([B, H] or [B, H, K]) by which the initial state
    enters the last one (0 where the row's last token is in another document than its first).
    """
    B, T, H, K = q_BTHK.shape
    state = q_BTHK.new_zeros(B, H, K, v_BTHV.shape[-1]) if initial_state_BHKV is None else initial_state_BHKV
    decay = torch.ones_like(g[:, 0])
    outputs = []
    for t in range(T):
        carry = g[:, t].exp()
        if document_ids_BT is not None and t > 0:
            begins = document_ids_BT[:, t] != document_ids_BT[:, t - 1]
            carry = carry.masked_fill(begins.view(B, *(1,) * (carry.dim() - 1)), 0.0)
        # One factor a head scales the whole state, one per key channel scales its row.
        of_rows = carry[..., None, None] if carry.dim() == 2 else carry[..., None]
        state = of_rows * state + k_BTHK[:, t, :, :, None] * v_BTHV[:, t, :, None, :]
        decay = carry * decay
        outputs.append(torch.einsum("bhkv,bhk->bhv", state, q_BTHK[:, t]))
    return torch.stack(outputs, dim=1), state, decay


def mamba2_by_steps(
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    A_log_H: Tensor,
    B_BTGN: Tensor,
    C_BTGN: Tensor,
    D_H: Tensor,
    dt_bias_H: Tensor,
    document_ids_BT: Tensor | None,
    initial_state_BHPN: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mamba-2 (Dao and Gu 2024, arXiv 2405.21060, section 2) as the recurrence above with k = B, q = C, v = dt x.

    Returns y [B, T, H, P], the last state [B, H, P, N] and the factor [B, H] on the initial state.
    """
    dt_BTH = F.softplus(dt_BTH + dt_bias_H)
    heads_per_group = x_BTHP.shape[2] // B_BTGN.shape[2]
    k_BTHN = B_BTGN.repeat_interleave(heads_per_group, dim=2)
    q_BTHN = C_BTGN.repeat_interleave(heads_per_group, dim=2)
    initial = None if initial_state_BHPN is None else initial_state_BHPN.transpose(-1, -2)
    g_BTH = -A_log_H.exp() * dt_BTH
    y_BTHP, state_BHNP, decay_BH = scan_by_steps(
        q_BTHN, k_BTHN, dt_BTH[..., None] * x_BTHP, g_BTH, document_ids_BT, initial
    )
    return y_BTHP + D_H[:, None] * x_BTHP, state_BHNP.transpose(-1, -2), decay_BH
