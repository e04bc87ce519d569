"""Sliding-window attention by PyTorch's scaled_dot_product_attention, in blocks that see themselves and the block before.

A block has as many queries as the window has keys, so that its keys are in two blocks: work and memory grow with
tokens x window. What documents and windows hide is masked; a masked weight is zero bitwise.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from amfm.kernels.attention.sinks import attend_with_sinks
from amfm.kernels.common.gemm_precision import gemm_dtype

# Smaller windows share blocks of this many tokens: a call for a few tokens costs as much as one for many.
_LEAST_BLOCK_TOKENS = 64


class WindowSums(NamedTuple):
    """Attention in windows with what other terms may join it by: o [B, T, H, V] is the softmax's output.

    highest [B, T, H]: the largest scaled score of each query's window. mass [B, T, H]: the sum of e^(score - highest), at
    least 1. Both in float32 (float64 for float64 inputs).
    """

    o_BTHV: Tensor
    highest_BTH: Tensor
    mass_BTH: Tensor


class _Blocks(NamedTuple):
    """Queries [N, H, L, K], the keys and values [N, J, S, K] that each block sees, and what it may see [N, 1, L, S]."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor


def window_attention_torch(
    q_BTHK: Tensor,
    k_BSJK: Tensor,
    v_BSJK: Tensor,
    *,
    document_ids_BS: Tensor | None,
    scale: float,
    window: int,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """As `attention_reference` with a window; bfloat16 is widened on processors that would emulate it.

    Keys before the first query (from a cache or other ranks) are kept as far as the window looks back.
    Gradients come from autograd through the views and the call. Source: Beltagy et al. 2020 (arXiv 2004.05150),
    section 3.1.
    """
    q, k, v, mask = _cut_blocks(q_BTHK, k_BSJK, v_BSJK, document_ids_BS, window)
    if sinks_H is not None:
        y = attend_with_sinks(q, k, v, sinks_H, mask, scale, causal=False)
        return _join_blocks(y, q_BTHK).to(q_BTHK.dtype)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return _join_blocks(y, q_BTHK).to(q_BTHK.dtype)


def window_sums_torch(
    q_BTHK: Tensor, k_BSJK: Tensor, v_BSJK: Tensor, *, document_ids_BS: Tensor | None, scale: float, window: int
) -> WindowSums:
    """As `window_attention_torch`, with the largest score and the mass, which PyTorch's attention does not give.

    By products of its own in the same blocks: memory for [L, 2 L] scores per block and head, kept for backward.
    """
    q, k, v, mask = _cut_blocks(q_BTHK, k_BSJK, v_BSJK, document_ids_BS, window)
    num_blocks, heads, block, _ = q.shape
    kv_heads = k.shape[1]
    # Queries of the heads that share a key head stand one after the other, so that one product reads the keys once.
    scores = q.reshape(num_blocks, kv_heads, -1, q.shape[3]) @ k.transpose(2, 3)
    wide = torch.promote_types(scores.dtype, torch.float32)
    scores = (scores.to(wide) * scale).view(num_blocks, heads, block, -1).masked_fill(~mask, -torch.inf)
    highest = scores.amax(-1, keepdim=True)
    weights = (scores - highest).exp()
    mass = weights.sum(-1, keepdim=True)
    o = weights.to(v.dtype).view(num_blocks, kv_heads, -1, weights.shape[3]) @ v
    o = o.view(num_blocks, heads, block, -1) / mass.to(o.dtype)
    o, highest, mass = (_join_blocks(x, q_BTHK) for x in (o, highest, mass))
    return WindowSums(o.to(q_BTHK.dtype), highest[..., 0], mass[..., 0])


def _cut_blocks(q_BTHK: Tensor, k_BSJK: Tensor, v_BSJK: Tensor, ids_BS: Tensor | None, window: int) -> _Blocks:
    """Cut queries into blocks, each with the keys and values that its queries may see."""
    dtype = gemm_dtype(q_BTHK)
    batch, tokens, heads, size = q_BTHK.shape
    block = min(max(window, _LEAST_BLOCK_TOKENS), tokens)
    # Keys that no query sees are left out; rows begin with a block (or what a block looks back on) of keys for all.
    padding, before = -tokens % block, max(block, window - 1)
    missing = before - min(before, k_BSJK.shape[1] - tokens)
    if ids_BS is None:
        ids_BS = torch.zeros(k_BSJK.shape[:2], dtype=torch.int32, device=k_BSJK.device)
    seen = before - missing + tokens
    k_BSJK, v_BSJK = (_pad(x[:, -seen:].to(dtype), missing, padding) for x in (k_BSJK, v_BSJK))
    # Ids that no document has: -1 before the row and -2 after it, so that padding is seen only by padding.
    ids_BS = F.pad(F.pad(ids_BS[:, -seen:], (missing, 0), value=-1), (0, padding), value=-2)
    q_BTHK = _pad(q_BTHK.to(dtype), 0, padding)
    blocks = q_BTHK.shape[1] // block
    q = q_BTHK.view(batch * blocks, block, heads, size).transpose(1, 2)
    k, v = (_overlapping(x, blocks, block).flatten(0, 1).transpose(1, 2) for x in (k_BSJK, v_BSJK))
    mask = _mask(ids_BS, blocks, block, before, window).flatten(0, 1)[:, None]
    return _Blocks(q, k, v, mask)


def _join_blocks(y: Tensor, q_BTHK: Tensor) -> Tensor:
    """Put blocks [N, H, L, V] together to rows [B, T, H, V] of these queries, without the padding."""
    batch, tokens, heads, _ = q_BTHK.shape
    return y.transpose(1, 2).reshape(batch, -1, heads, y.shape[3])[:, :tokens]


def _pad(x_BSJK: Tensor, before: int, after: int) -> Tensor:
    """Zeros before and after the tokens of [B, S, J, K]."""
    return F.pad(x_BSJK, (0, 0, 0, 0, before, after))


def _overlapping(x_BS: Tensor, blocks: int, block: int) -> Tensor:
    """[B, before + blocks * block, ...] -> [B, blocks, before + block, ...]: what each block's queries may see.

    If there are several blocks a window is no longer than one, so that `before` is one block. Two views of all of
    them, and not one per block: the backward of each view fills a gradient as long as the row.
    """
    if blocks == 1:
        return x_BS[:, None]
    halves = (x_BS[:, :-block], x_BS[:, block:])
    return torch.cat([half.unflatten(1, (blocks, block)) for half in halves], dim=2)


def _mask(ids_BS: Tensor, blocks: int, block: int, before: int, window: int) -> Tensor:
    """[B, blocks, block, before + block]: keys of the query's document, up to it, among the last `window`."""
    keys_BNS = _overlapping(ids_BS, blocks, block)
    same = keys_BNS[:, :, before:, None] == keys_BNS[:, :, None, :]
    distance = torch.arange(block, device=ids_BS.device)[:, None] + before
    distance = distance - torch.arange(before + block, device=ids_BS.device)
    return same & (distance >= 0) & (distance < window)
