"""Attention by PyTorch's scaled_dot_product_attention: causal inside documents, over windows, and with sinks.

On CPU documents are attended one by one: no work is done across them, and a document's result cannot depend on
another's, not even in rounding. Very short documents are masked instead, since each call costs some 0.2 ms.

PyTorch's kernel of bfloat16 there pays for long documents only: both passes over one of 64 tokens in heads of 32 take half of
the time in float32, whose products a short one hardly needs faster.

A window's block has as many queries as the window has keys, so that its keys are in two blocks: work and memory grow with
tokens x window. What documents and windows hide is masked; a masked weight is zero bitwise.

A sink z adds e^z to a head's sum of weights and nothing to its values, so with lse' = log(e^lse + e^z) the output is
o' = o e^(lse - lse'). Backward of attention reads only o and lse besides its inputs. Given o' and lse' in their place it makes
the probabilities with sinks and all gradients of them, and the sink's is -sum e^(z - lse') <do, o'>. So a library's own forward
and backward serve, of which PyTorch's for processors hands the log-sum-exp out.

Elsewhere a key of one more channel stands before the others: q' = [q, z / scale], k' = [0, 1], v' = 0. Its score is z, any
attention computes it, and heads become a few channels wider.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from amfm.kernels.common.gemm_precision import gemm_dtype

# Documents shorter than this on average are masked rather than attended one by one.
_SHORT_DOCUMENT_TOKENS = 16
# Tokens times channels of a head up to which a document is attended in float32 on a CPU.
_WIDENED_VALUES = 16384
# Smaller windows share blocks of this many tokens: a call for a few tokens costs as much as one for many.
_LEAST_BLOCK_TOKENS = 64
# Rows of tensor cores' operands are multiples of this many channels.
_CHANNELS = 8


def attention_torch(
    q_BTHK: Tensor,
    k_BSJK: Tensor,
    v_BSJK: Tensor,
    *,
    document_ids_BS: Tensor | None,
    scale: float,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """As `attention_reference`; bfloat16 is widened on processors that would emulate it."""
    dtype, wanted = gemm_dtype(q_BTHK), q_BTHK.dtype
    q_BTHK, k_BSJK, v_BSJK = q_BTHK.to(dtype), k_BSJK.to(dtype), v_BSJK.to(dtype)
    if document_ids_BS is None:
        y_BTHK = _attend_last(q_BTHK, k_BSJK, v_BSJK, scale, sinks_H)
    elif q_BTHK.device.type == "cpu" and not torch.compiler.is_compiling():
        y_BTHK = _attend_documents(q_BTHK, k_BSJK, v_BSJK, document_ids_BS, scale, sinks_H)
    else:
        y_BTHK = _attend(
            q_BTHK, k_BSJK, v_BSJK, _document_mask(document_ids_BS, q_BTHK.shape[1]), scale, sinks_H, causal=False
        )
    return y_BTHK.to(wanted)


def _attend(
    q_BTHK: Tensor,
    k_BSJK: Tensor,
    v_BSJK: Tensor,
    mask: Tensor | None,
    scale: float,
    sinks_H: Tensor | None,
    *,
    causal: bool,
) -> Tensor:
    """One call of PyTorch's attention on [B, T, H, K] tensors, causal or with a mask that is True if a key is
    seen.

    Grouped key heads are left to PyTorch (`enable_gqa`): repeating keys first would copy them H / J times.
    """
    grouped = q_BTHK.shape[2] != k_BSJK.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q_BTHK, k_BSJK, v_BSJK))
    if sinks_H is not None:
        return attend_with_sinks(q, k, v, sinks_H, mask, scale, causal=causal).transpose(1, 2)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped)
    return y.transpose(1, 2)


def _causal_mask(tokens: int, keys: int, device: torch.device) -> Tensor:
    """Which keys each query may see [T, S], the last T keys being those of the queries."""
    return torch.ones(tokens, keys, dtype=torch.bool, device=device).tril(keys - tokens)


def _document_mask(document_ids_BS: Tensor, tokens: int) -> Tensor:
    """Which keys each of the last `tokens` may see [B, 1, T, S]: those up to itself of its document."""
    keys = document_ids_BS.shape[1]
    same = document_ids_BS[:, keys - tokens :, None] == document_ids_BS[:, None, :]
    return same.tril(keys - tokens)[:, None]


def _attend_documents(
    q_BTHK: Tensor, k_BSJK: Tensor, v_BSJK: Tensor, document_ids_BS: Tensor, scale: float, sinks_H: Tensor | None
) -> Tensor:
    """Attention document by document, [B, T, H, K], for CPU.

    Reads the ids on the host, which is free there and would wait for the device on a GPU; the length of the
    loop is the number of documents in all rows, so the operation cannot be traced by a compiler.
    """
    batch, tokens, keys = *q_BTHK.shape[:2], k_BSJK.shape[1]
    starts = torch.ones_like(document_ids_BS, dtype=torch.bool)
    starts[:, 1:] = document_ids_BS[:, 1:] != document_ids_BS[:, :-1]
    first = starts.reshape(-1).nonzero()[:, 0]
    # One document per row: the call without mask, which may use PyTorch's flash kernel.
    if first.numel() == batch:
        return _attend_last(q_BTHK, k_BSJK, v_BSJK, scale, sinks_H)
    if first.numel() * _SHORT_DOCUMENT_TOKENS > batch * keys:
        return _attend(q_BTHK, k_BSJK, v_BSJK, _document_mask(document_ids_BS, tokens), scale, sinks_H, causal=False)
    begins = first.tolist()
    # Rows are laid end to end, so that one list of begins describes the documents of all rows; no document
    # spans two rows because each row begins one.
    lengths = [end - begin for begin, end in zip(begins, [*begins[1:], batch * keys])]
    # Of a document that begins before its row's queries only the last tokens are queries; it may have none.
    queries = [min(length, max(0, begin % keys + length - (keys - tokens))) for begin, length in zip(begins, lengths)]
    q_parts = q_BTHK.reshape(1, batch * tokens, *q_BTHK.shape[2:]).split(queries, 1)
    k_parts, v_parts = (x.reshape(1, batch * keys, *x.shape[2:]).split(lengths, 1) for x in (k_BSJK, v_BSJK))
    outputs = [_attend_last(q, k, v, scale, sinks_H) for q, k, v in zip(q_parts, k_parts, v_parts) if q.shape[1]]
    return torch.cat(outputs, 1).view(q_BTHK.shape)


def _attend_last(q_BTHK: Tensor, k_BSJK: Tensor, v_BSJK: Tensor, scale: float, sinks_H: Tensor | None) -> Tensor:
    """Causal attention without documents, the queries being those of the last keys."""
    tokens, keys = q_BTHK.shape[1], k_BSJK.shape[1]
    # A single query sees every key and T = S is `is_causal`; only a cached prefix needs a mask. PyTorch aligns
    # `is_causal` with the first key, not with the last, so it cannot be used there.
    mask = None if tokens in (1, keys) else _causal_mask(tokens, keys, q_BTHK.device)
    is_narrow = q_BTHK.device.type == "cpu" and q_BTHK.dtype == torch.bfloat16
    if is_narrow and tokens == keys and tokens * q_BTHK.shape[-1] <= _WIDENED_VALUES:
        wide = q_BTHK.float(), k_BSJK.float(), v_BSJK.float()
        return _attend(*wide, None, scale, sinks_H, causal=tokens > 1).to(q_BTHK.dtype)
    return _attend(q_BTHK, k_BSJK, v_BSJK, mask, scale, sinks_H, causal=tokens == keys and tokens > 1)


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
    q, k, v, mask = cut_blocks(q_BTHK, k_BSJK, v_BSJK, document_ids_BS, window)
    if sinks_H is not None:
        y = attend_with_sinks(q, k, v, sinks_H, mask, scale, causal=False)
        return join_blocks(y, q_BTHK).to(q_BTHK.dtype)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return join_blocks(y, q_BTHK).to(q_BTHK.dtype)


def cut_blocks(q_BTHK: Tensor, k_BSJK: Tensor, v_BSJK: Tensor, ids_BS: Tensor | None, window: int) -> _Blocks:
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


def join_blocks(y: Tensor, q_BTHK: Tensor) -> Tensor:
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


def attend_with_sinks(
    q_BHTK: Tensor,
    k_BJSK: Tensor,
    v_BJSK: Tensor,
    sinks_H: Tensor,
    mask: Tensor | None,
    scale: float,
    *,
    causal: bool,
) -> Tensor:
    """As scaled_dot_product_attention of q [B, H, T, K], k and v [B, J, S, K] -> [B, H, T, K]; mask [.., T, S] of bools, or None."""
    if k_BJSK.shape[1] != q_BHTK.shape[1]:
        repeat = q_BHTK.shape[1] // k_BJSK.shape[1]
        k_BJSK, v_BJSK = (x.repeat_interleave(repeat, dim=1) for x in (k_BJSK, v_BJSK))
    if not _has_log_sums(q_BHTK):
        return _attend_wider(q_BHTK, k_BJSK, v_BJSK, sinks_H, mask, scale, causal=causal)
    if mask is not None:
        mask = q_BHTK.new_zeros(mask.shape).masked_fill(~mask, -torch.inf)
    y: Tensor = _FlashWithSinks.apply(q_BHTK, k_BJSK, v_BJSK, sinks_H, mask, scale, causal)
    return y


def _has_log_sums(q: Tensor) -> bool:
    """Whether PyTorch's attention for this device hands its log-sum-exp out."""
    return q.device.type == "cpu"


class _FlashWithSinks(torch.autograd.Function):
    """PyTorch's flash attention for processors, its output and log-sum-exp replaced by those with sinks."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks_H: Tensor, mask: Tensor | None, scale: float, causal: bool
    ) -> Tensor:
        o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, attn_mask=mask, scale=scale
        )
        together = torch.logaddexp(lse, sinks_H[:, None].to(lse.dtype))
        o = o * (lse - together).exp()[..., None].to(o.dtype)
        ctx.scale, ctx.causal = scale, causal
        ctx.save_for_backward(q, k, v, sinks_H, o, together, mask)
        return o

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sinks_H, o, together, mask = ctx.saved_tensors
        d_q, d_k, d_v = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grads[0], q, k, v, o, together, 0.0, ctx.causal, attn_mask=mask, scale=ctx.scale
        )
        weights = (sinks_H[:, None].to(together.dtype) - together).exp()
        d_sinks = -(weights * torch.linalg.vecdot(grads[0], o).to(together.dtype)).sum((0, 2))
        return d_q, d_k, d_v, d_sinks.to(sinks_H.dtype), None, None, None


def _attend_wider(
    q: Tensor, k: Tensor, v: Tensor, sinks_H: Tensor, mask: Tensor | None, scale: float, *, causal: bool
) -> Tensor:
    """The same with one more key, and one more query so that a causal call stays one; differentiated by PyTorch."""
    batch, heads, _, size = q.shape
    more = _CHANNELS - size % _CHANNELS
    # A query and a key more, before the others; of the query's channels the first new one is the sink's.
    score_H1 = (sinks_H.to(torch.promote_types(q.dtype, torch.float32)) / scale).to(q.dtype)[:, None]
    channel = score_H1.expand(batch, heads, q.shape[2])[..., None]
    wide_q = F.pad(torch.cat([q, channel], dim=-1), (0, more - 1, 1 if causal else 0, 0))
    key = F.pad(k.new_ones(batch, heads, 1, 1), (size, more - 1))
    wide_k = torch.cat([key, F.pad(k, (0, more))], dim=2)
    wide_v = F.pad(v, (0, more, 1, 0))
    wide_mask = None if mask is None else F.pad(mask, (1, 0), value=True)
    y = F.scaled_dot_product_attention(wide_q, wide_k, wide_v, attn_mask=wide_mask, is_causal=causal, scale=scale)
    return y[:, :, 1 if causal else 0 :, :size]
