"""Causal attention inside documents by PyTorch's scaled_dot_product_attention.

On CPU documents are attended one by one: no work is done across them, and a document's result cannot depend on
another's, not even in rounding. Very short documents are masked instead, since each call costs some 0.2 ms.

PyTorch's kernel of bfloat16 there pays for long documents only: both passes over one of 64 tokens in heads of 32 take half of
the time in float32, whose products a short one hardly needs faster.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from amfm.kernels.attention.sinks import attend_with_sinks
from amfm.kernels.common.gemm_precision import gemm_dtype

# Documents shorter than this on average are masked rather than attended one by one.
_SHORT_DOCUMENT_TOKENS = 16
# Tokens times channels of a head up to which a document is attended in float32 on a CPU.
_WIDENED_VALUES = 16384


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
