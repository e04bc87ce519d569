"""Causal attention inside documents, one query at a time: the meaning the fast paths must keep."""

from __future__ import annotations

import torch
from torch import Tensor


def attention_reference(
    q_BTHK: Tensor,
    k_BSJK: Tensor,
    v_BSJK: Tensor,
    *,
    document_ids_BS: Tensor | None,
    scale: float,
    window: int | None = None,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """Softmax over the keys up to the query (the last keys align with the queries) of the query's document and window.

    A sink is one more score of the head, whose weight is dropped.

    Shapes as in `attention`: q [B, T, H, K], k and v [B, S, J, K] -> [B, T, H, K], computed in the dtype of the
    inputs, so that float64 gives an exact yardstick. Differentiable by autograd; a Python step for each query,
    for tests only.
    """
    batch, tokens, heads, _ = q_BTHK.shape
    # Keys before the queries come from a cache or from other ranks: query t stands at key offset + t.
    offset = k_BSJK.shape[1] - tokens
    repeat = heads // k_BSJK.shape[2]
    k_BSHK, v_BSHK = k_BSJK.repeat_interleave(repeat, 2), v_BSJK.repeat_interleave(repeat, 2)
    rows = []
    for row in range(batch):
        outputs = []
        for query in range(tokens):
            begin, end = 0, offset + query + 1
            if document_ids_BS is not None:
                same = document_ids_BS[row, :end] == document_ids_BS[row, end - 1]
                # Ids do not decrease, so the first equal id is the document's first key.
                begin = int(same.int().argmax())
            if window is not None:
                begin = max(begin, end - window)
            scores_HS = torch.einsum("hk,shk->hs", q_BTHK[row, query], k_BSHK[row, begin:end]) * scale
            if sinks_H is not None:
                scores_HS = torch.cat([scores_HS, sinks_H[:, None].to(scores_HS.dtype)], dim=1)
            weights_HS = scores_HS.softmax(-1)[:, : end - begin]
            outputs.append(torch.einsum("hs,shk->hk", weights_HS, v_BSHK[row, begin:end]))
        rows.append(torch.stack(outputs))
    return torch.stack(rows)


def window_sums_reference(
    q_BTHK: Tensor,
    k_BSJK: Tensor,
    v_BSJV: Tensor,
    *,
    document_ids_BS: Tensor | None,
    scale: float,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention in windows with its largest score and mass a query, from the whole matrix [T, S] of scores.

    Shapes as in `window_sums`; in the dtype of the inputs, for tests only.
    """
    tokens, keys = q_BTHK.shape[1], k_BSJK.shape[1]
    repeat = q_BTHK.shape[2] // k_BSJK.shape[2]
    k_BSHK, v_BSHV = k_BSJK.repeat_interleave(repeat, 2), v_BSJV.repeat_interleave(repeat, 2)
    distance_TS = torch.arange(keys - tokens, keys, device=q_BTHK.device)[:, None] - torch.arange(
        keys, device=q_BTHK.device
    )
    seen_BTS = ((distance_TS >= 0) & (distance_TS < window)).expand(len(q_BTHK), -1, -1)
    if document_ids_BS is not None:
        seen_BTS = seen_BTS & (document_ids_BS[:, keys - tokens :, None] == document_ids_BS[:, None])
    scores_BHTS = torch.einsum("bthk,bshk->bhts", q_BTHK, k_BSHK) * scale
    scores_BHTS = scores_BHTS.masked_fill(~seen_BTS[:, None], -torch.inf)
    highest_BHT = scores_BHTS.amax(-1)
    weights_BHTS = (scores_BHTS - highest_BHT[..., None]).exp()
    mass_BHT = weights_BHTS.sum(-1)
    o_BTHV = torch.einsum("bhts,bshv->bthv", weights_BHTS / mass_BHT[..., None], v_BSHV)
    return o_BTHV, highest_BHT.transpose(1, 2), mass_BHT.transpose(1, 2)
