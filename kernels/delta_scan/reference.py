"""The gated delta product one step at a time, in any dtype: the definition that every other form is compared with."""

from __future__ import annotations

import torch
from torch import Tensor


def delta_by_steps(
    q_BTGK: Tensor,
    k_BTNGK: Tensor,
    v_BTNHV: Tensor,
    beta_BTNH: Tensor,
    g_BTH: Tensor | None,
    initial_state_BHKV: Tensor | None,
    document_ids_BT: Tensor | None,
    erase_BTHK: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the delta rule step by step.

    S <- diag(e^(g_t)) S, then S <- (I - beta k k^T) S + beta k v^T for each of a token's N steps, then o_t =
    S^T q_t.

    q [B, T, G, K], k [B, T, N, G, K], v [B, T, N, H, V], beta [B, T, N, H]; g has one number per head, [B, T, H],
    or, as [B, T, H, K], one per key channel. erase [B, T, H, K], with N = 1 and G = H, is what the state is asked with
    in place of k. S = 0 before the first token of each document. Returns o [B, T, H,
    V] and the state [B, H, K, V] after the last token, in the dtype of the inputs, differentiable by autograd.
    """
    B, T, G, K = q_BTGK.shape
    N, H, V = v_BTNHV.shape[2:]
    state = v_BTNHV.new_zeros(B, H, K, V) if initial_state_BHKV is None else initial_state_BHKV
    outputs = []
    for t in range(T):
        # The initial state belongs to the first token's document, so t = 0 never resets it.
        if document_ids_BT is not None and t > 0:
            continues = document_ids_BT[:, t] == document_ids_BT[:, t - 1]
            state = torch.where(continues[:, None, None, None], state, torch.zeros_like(state))
        if g_BTH is not None:
            decay = g_BTH[:, t].exp()
            state = (decay[..., None, None] if decay.dim() == 2 else decay[..., None]) * state
        for j in range(N):
            k_BHK = k_BTNGK[:, t, j].repeat_interleave(H // G, dim=1)
            # What the state answers to the key now; the step moves it towards v by beta.
            asked_BHK = k_BHK if erase_BTHK is None else erase_BTHK[:, t]
            remembered_BHV = torch.einsum("bhkv,bhk->bhv", state, asked_BHK)
            change_BHV = beta_BTNH[:, t, j, :, None] * (v_BTNHV[:, t, j] - remembered_BHV)
            state = state + k_BHK[..., None] * change_BHV[:, :, None]
        outputs.append(torch.einsum("bhkv,bhk->bhv", state, q_BTGK[:, t].repeat_interleave(H // G, dim=1)))
    return torch.stack(outputs, dim=1), state
