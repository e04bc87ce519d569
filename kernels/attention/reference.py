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
) -> Tensor:
    """Softmax over the keys up to the query (the last keys align with the queries) of the query's document and window.

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
            outputs.append(torch.einsum("hs,shk->hk", scores_HS.softmax(-1), v_BSHK[row, begin:end]))
        rows.append(torch.stack(outputs))
    return torch.stack(rows)
