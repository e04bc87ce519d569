"""Attention to the last keys of a row with a bias for each distance, by blocks of a window."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def attend_near(q_BCK: Tensor, k_BSK: Tensor, v_BSE: Tensor, ids_BS: Tensor, bias_W: Tensor, weights: str) -> Tensor:
    """Attend to the last W keys of the query's document: [B, C, E]. There are W - 1 keys before the first query's own.

    ids [B, S]: documents of the keys, negative for a slot without one. bias [W]: for a key this many places back.
    weights: softmax(q k / sqrt(K) + bias), or relu2, relu(q k / W + bias)^2. Zeros for queries without a key. Memory is
    that of 2 W weights per query.
    """
    _, C, K = q_BCK.shape
    W = len(bias_W)
    if C == 0:
        return v_BSE[:, :0]
    wide = torch.promote_types(q_BCK.dtype, torch.float32)
    rest = -C % W
    q_BNWK = functional.pad(q_BCK, (0, 0, 0, rest)).unflatten(1, (-1, W))
    k_BNXK, v_BNXE = (
        functional.pad(x, (0, 0, 0, rest)).unfold(1, 2 * W - 1, W).transpose(2, 3) for x in (k_BSK, v_BSE)
    )
    ids_BNX = functional.pad(ids_BS, (0, rest), value=-1).unfold(1, 2 * W - 1, W)
    own_W, key_X = torch.arange(W, device=q_BCK.device), torch.arange(2 * W - 1, device=q_BCK.device)
    back_WX = own_W[:, None] + W - 1 - key_X
    is_near_WX = (back_WX >= 0) & (back_WX < W)
    own_BNW = ids_BNX[..., W - 1 :]
    is_seen = is_near_WX & (own_BNW[..., None] == ids_BNX[:, :, None]) & (own_BNW >= 0)[..., None]
    scores = (q_BNWK @ k_BNXK.transpose(2, 3)).to(wide) * (K**-0.5 if weights == "softmax" else 1 / W)
    scores = scores + bias_W.to(wide)[back_WX.clamp(0, W - 1)]
    if weights == "softmax":
        highest = scores.masked_fill(~is_seen, -torch.inf).amax(-1, keepdim=True).clamp(min=torch.finfo(wide).min)
        each = (scores.masked_fill(~is_seen, -torch.inf) - highest.detach()).exp()
        each = each / each.sum(-1, keepdim=True).clamp(min=torch.finfo(wide).tiny)
    else:
        each = torch.where(is_seen, functional.relu(scores).square(), 0.0)
    return (each.to(v_BNXE.dtype) @ v_BNXE).flatten(1, 2)[:, :C]
