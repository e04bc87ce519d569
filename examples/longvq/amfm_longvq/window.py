"""Sums over the last keys of a row, weighted by scores and distance, by blocks of a window."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def near_sums(q_BTHK: Tensor, k_BSHK: Tensor, v_BSHV: Tensor, ids_BS: Tensor, bias_HW: Tensor, bound: float) -> Tensor:
    """Sum e^(q k / sqrt(K) + bias - bound) v over the last W keys of the query's document: [B, T, H, V].

    There are W - 1 keys before the first query's own. ids [B, S]: documents of the keys. bias [H, W]: for a key this
    many places back. Memory is that of 2 W weights per query and head.
    """
    T, K, W = q_BTHK.shape[1], q_BTHK.shape[-1], bias_HW.shape[1]
    rest, wide = -T % W, torch.promote_types(q_BTHK.dtype, torch.float32)
    q_BNHWK = functional.pad(q_BTHK, (0, 0, 0, 0, 0, rest)).unflatten(1, (-1, W)).transpose(2, 3)
    k_BNHKX, v_BNHVX = (functional.pad(x, (0, 0, 0, 0, 0, rest)).unfold(1, 2 * W - 1, W) for x in (k_BSHK, v_BSHV))
    ids_BNX = functional.pad(ids_BS, (0, rest), value=-1).unfold(1, 2 * W - 1, W)
    own_W, key_X = torch.arange(W, device=q_BTHK.device), torch.arange(2 * W - 1, device=q_BTHK.device)
    back_WX = own_W[:, None] + W - 1 - key_X
    is_near_WX = (back_WX >= 0) & (back_WX < W)
    is_seen = is_near_WX & (ids_BNX[..., W - 1 :, None] == ids_BNX[:, :, None])
    scores = (q_BNHWK @ k_BNHKX).to(wide) * K**-0.5 + (bias_HW.to(wide)[:, back_WX.clamp(0, W - 1)] - bound)
    weights = scores.masked_fill(~is_seen[:, :, None], -torch.inf).exp()
    sums = weights @ v_BNHVX.transpose(-1, -2).to(wide)
    return sums.transpose(2, 3).flatten(1, 2)[:, :T]
