"""The largest log-sum-exp of each head's queries: what a clip of queries and keys bounds the scores by.

A score is at most the log-sum-exp of its query, and that is at most the largest score plus the logarithm of the keys. The Triton
kernel of attention keeps these sums for its backward pass; PyTorch's attention keeps them to itself, so here they come from
a second product of queries and keys, some queries at a time.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Queries whose scores are in memory at once.
_QUERIES = 128


@torch.no_grad()
def note_log_sums(
    highest_H: Tensor,
    q_BTHK: Tensor,
    k_BSJK: Tensor,
    *,
    document_ids_BS: Tensor | None,
    scale: float,
    window: int | None = None,
) -> None:
    """Raise `highest_H` [H] in place to the largest log-sum-exp of each head, by products of PyTorch; shapes as in `attention`.

    Only of keys, without sinks. In float32 at least.
    """
    dtype = torch.promote_types(q_BTHK.dtype, torch.float32)
    tokens, keys, kv_heads = q_BTHK.shape[1], k_BSJK.shape[1], k_BSJK.shape[2]
    before = keys - tokens
    q_BTJRK = q_BTHK.unflatten(2, (kv_heads, -1))
    for start in range(0, tokens, _QUERIES):
        stop = min(start + _QUERIES, tokens)
        first, end = 0 if window is None else max(0, before + start - window + 1), before + stop
        scores_BJRTS = torch.einsum(
            "btjrk,bsjk->bjrts", q_BTJRK[:, start:stop].to(dtype), k_BSJK[:, first:end].to(dtype)
        )
        place_T1 = torch.arange(before + start, end, device=q_BTHK.device)[:, None]
        distance_TS = place_T1 - torch.arange(first, end, device=q_BTHK.device)
        is_seen = (distance_TS >= 0) & (distance_TS < (keys if window is None else window))
        if document_ids_BS is not None:
            same_BTS = document_ids_BS[:, before + start : end, None] == document_ids_BS[:, None, first:end]
            is_seen = (is_seen & same_BTS)[:, None, None]
        raise_highest(highest_H, (scores_BJRTS * scale).masked_fill(~is_seen, -torch.inf).logsumexp(-1).flatten(1, 2))


@torch.no_grad()
def raise_highest(highest_H: Tensor, log_sums_BHT: Tensor) -> None:
    """Raise `highest_H` [H] in place to the largest of each head's log-sum-exps [B, H, T]."""
    found_H = log_sums_BHT.transpose(0, 1).flatten(1).amax(1)
    highest_H.copy_(torch.maximum(highest_H, found_H.to(highest_H.dtype)))


def of_keys_alone(log2_sums_BHT: Tensor, sinks_H: Tensor | None) -> Tensor:
    """Log-sum-exp of keys from that in base 2 with the sink among its terms; of a query that sees little else, about minus infinity."""
    log_sums_BHT = log2_sums_BHT * math.log(2.0)
    if sinks_H is None:
        return log_sums_BHT
    return log_sums_BHT + torch.log1p(-(sinks_H.float()[:, None] - log_sums_BHT).exp().clamp(max=1.0))
