"""Rotation by angles that data decides: sums over a document, by which heads are turned.

Rotary positions turn by a fixed speed a channel pair. In Mamba-3 every token says how far each pair turns, so that the
angle is a running sum over the document, and a state that reads turned keys with turned queries can count modulo
anything (Lahoti et al. 2026, Mamba-3, section 3.2). Two maps do it, in PyTorch behind every backend: `sum_angles` and
`turn_heads`. The second keeps only what it reads, which is narrower than what it gives: heads share keys, and scan keeps
the turned ones anyway.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# Tokens whose angles one product sums.
_BLOCK = 64


def sum_angles(angles_BTX: Tensor, document_ids_BT: Tensor | None) -> Tensor:
    """Sum angles over the document up to each token, [B, T, X] -> [B, T, X], in float32 or float64.

    What enters a block of tokens is taken modulo 2 pi, so that digits do not go to whole turns however long the document.
    Sums inside of a block are products with zeros and ones: one document holds no bit of another. Ids [B, T] differ between
    all documents of a row; None: one document.
    """
    num_tokens = angles_BTX.shape[1]
    size = min(_BLOCK, num_tokens)
    padding = -num_tokens % size
    angles_BLQX = F.pad(angles_BTX, (0, 0, 0, padding)).unflatten(1, (-1, size))
    inside = torch.ones(size, size, dtype=torch.bool, device=angles_BTX.device).tril()
    ids_BLQ = None
    if document_ids_BT is not None:
        ids_BLQ = F.pad(document_ids_BT, (0, padding), value=-1).unflatten(1, (-1, size))
        inside = inside & (ids_BLQ[..., :, None] == ids_BLQ[..., None, :])
    summed_BLQX = inside.to(angles_BTX.dtype) @ angles_BLQX
    if padding + num_tokens > size:
        ends_BL = None if ids_BLQ is None else ids_BLQ[:, :-1, -1]
        entering_BLQX = sum_angles(within_turn(summed_BLQX[:, :-1, -1]), ends_BL)[:, :, None]
        if ids_BLQ is not None and ends_BL is not None:
            goes_on_BLQ = ids_BLQ[:, 1:] == ends_BL[..., None]
            entering_BLQX = torch.where(goes_on_BLQ[..., None], entering_BLQX, torch.zeros_like(entering_BLQX))
        summed_BLQX = torch.cat([summed_BLQX[:, :1], summed_BLQX[:, 1:] + entering_BLQX], dim=1)
    return summed_BLQX.flatten(1, 2)[:, :num_tokens]


def within_turn(angles: Tensor) -> Tensor:
    """Angles modulo 2 pi, in [0, 2 pi]; in float64 inside, because every turn adds the rounding of 2 pi."""
    return angles.double().remainder(2.0 * math.pi).to(angles.dtype)


def turn_heads(x_BTGN: Tensor, bias_HN: Tensor, angles_BTHA: Tensor, scale_BTH: Tensor | None = None) -> Tensor:
    """Scale * R(angle) (x + bias) of each head, [B, T, H, N]: neighbouring channels are a pair, the first A pairs turn.

    x [B, T, G, N] is shared by H / G heads each. Angles, and the scale if there is one, in float32 (float64 for float64
    inputs), as inside; the result has the dtype of x.
    """
    turned: Tensor = _TurnHeads.apply(x_BTGN, bias_HN, angles_BTHA, scale_BTH)
    return turned


def dot_heads(x_BTGN: Tensor, x_bias_HN: Tensor, y_BTGN: Tensor, y_bias_HN: Tensor) -> Tensor:
    """(x + bias) . (y + bias) of each head, [B, T, H], in float32 (float64); nothing as wide as heads' keys is made."""
    dtype, groups = torch.promote_types(x_BTGN.dtype, torch.float32), x_BTGN.shape[2]
    x, y = x_BTGN.to(dtype), y_BTGN.to(dtype)
    x_bias, y_bias = (bias.to(dtype).unflatten(0, (groups, -1)) for bias in (x_bias_HN, y_bias_HN))
    crossed = torch.einsum("btgn,grn->btgr", x, y_bias) + torch.einsum("btgn,grn->btgr", y, x_bias)
    return ((x * y).sum(-1, keepdim=True) + crossed + (x_bias * y_bias).sum(-1)).flatten(2)


class _TurnHeads(torch.autograd.Function):
    """Keeps its inputs and turns again in backward. A pair's gradient by its angle is the turned pair a quarter further."""

    @staticmethod
    def forward(ctx: Any, x_BTGN: Tensor, bias_HN: Tensor, angles_BTHA: Tensor, scale_BTH: Tensor | None) -> Tensor:
        ctx.save_for_backward(x_BTGN, bias_HN, angles_BTHA, scale_BTH)
        turned_BTHN = _rotate(_by_head(x_BTGN, bias_HN, angles_BTHA), angles_BTHA)
        if scale_BTH is not None:
            turned_BTHN = turned_BTHN * scale_BTH[..., None]
        return turned_BTHN.to(x_BTGN.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_BTHN: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        x_BTGN, bias_HN, angles_BTHA, scale_BTH = ctx.saved_tensors
        turned_BTHN = _rotate(_by_head(x_BTGN, bias_HN, angles_BTHA), angles_BTHA)
        d_BTHN, d_scale_BTH = d_BTHN.to(angles_BTHA.dtype), None
        if scale_BTH is not None:
            d_scale_BTH = (d_BTHN * turned_BTHN).sum(-1)
            d_BTHN = d_BTHN * scale_BTH[..., None]
        pairs = angles_BTHA.shape[-1]
        (d_first, d_second), (first, second) = _pairs(d_BTHN, pairs), _pairs(turned_BTHN, pairs)
        d_angles_BTHA = d_second * first - d_first * second
        d_BTHN = _rotate(d_BTHN, -angles_BTHA)
        d_x_BTGN = d_BTHN.unflatten(2, (x_BTGN.shape[2], -1)).sum(3)
        return d_x_BTGN.to(x_BTGN.dtype), d_BTHN.sum((0, 1)).to(bias_HN.dtype), d_angles_BTHA, d_scale_BTH


def _by_head(x_BTGN: Tensor, bias_HN: Tensor, angles_BTHA: Tensor) -> Tensor:
    """x + bias by head, [B, T, H, N], in the dtype of the angles."""
    (heads, _), dtype = bias_HN.shape, angles_BTHA.dtype
    return x_BTGN.to(dtype).repeat_interleave(heads // x_BTGN.shape[2], dim=2) + bias_HN.to(dtype)


def _rotate(x_BTHN: Tensor, angles_BTHA: Tensor) -> Tensor:
    """Turn the first pairs of neighbouring channels; the others pass."""
    pairs = angles_BTHA.shape[-1]
    cosine, sine = angles_BTHA.cos(), angles_BTHA.sin()
    first, second = _pairs(x_BTHN, pairs)
    turned = torch.stack([first * cosine - second * sine, first * sine + second * cosine], dim=-1).flatten(-2)
    return torch.cat([turned, x_BTHN[..., 2 * pairs :]], dim=-1)


def _pairs(x_BTHN: Tensor, pairs: int) -> tuple[Tensor, ...]:
    """First and second channels of the pairs that turn, [B, T, H, A] each."""
    return x_BTHN[..., : 2 * pairs].unflatten(-1, (pairs, 2)).unbind(-1)
