"""Causal attention inside documents by PyTorch's scaled_dot_product_attention.

On CPU documents are attended one by one: no work is done across them, and a document's result cannot depend on
another's, not even in rounding. Very short documents are masked instead, since each call costs some 0.2 ms.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.gemm_precision import gemm_dtype

# Documents shorter than this on average are masked rather than attended one by one.
_SHORT_DOCUMENT_TOKENS = 16


def attention_torch(
    q_BTHK: Tensor, k_BSJK: Tensor, v_BSJK: Tensor, *, document_ids_BT: Tensor | None, scale: float
) -> Tensor:
    """As `attention_reference`; bfloat16 is widened on processors that would emulate it."""
    dtype, wanted = gemm_dtype(q_BTHK), q_BTHK.dtype
    q_BTHK, k_BSJK, v_BSJK = q_BTHK.to(dtype), k_BSJK.to(dtype), v_BSJK.to(dtype)
    tokens, keys = q_BTHK.shape[1], k_BSJK.shape[1]
    if document_ids_BT is None:
        mask = None if tokens in (1, keys) else _causal_mask(tokens, keys, q_BTHK.device)
        y_BTHK = _attend(q_BTHK, k_BSJK, v_BSJK, mask, scale, causal=tokens == keys and tokens > 1)
    elif q_BTHK.device.type == "cpu" and not torch.compiler.is_compiling():
        y_BTHK = _attend_documents(q_BTHK, k_BSJK, v_BSJK, document_ids_BT, scale)
    else:
        y_BTHK = _attend(q_BTHK, k_BSJK, v_BSJK, _document_mask(document_ids_BT), scale, causal=False)
    return y_BTHK.to(wanted)


def _attend(
    q_BTHK: Tensor, k_BSJK: Tensor, v_BSJK: Tensor, mask: Tensor | None, scale: float, *, causal: bool
) -> Tensor:
    grouped = q_BTHK.shape[2] != k_BSJK.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q_BTHK, k_BSJK, v_BSJK))
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped)
    return y.transpose(1, 2)


def _causal_mask(tokens: int, keys: int, device: torch.device) -> Tensor:
    """Which keys each query may see [T, S], the last T keys being those of the queries."""
    return torch.ones(tokens, keys, dtype=torch.bool, device=device).tril(keys - tokens)


def _document_mask(document_ids_BT: Tensor) -> Tensor:
    """Which keys each query may see [B, 1, T, T]: earlier ones of its document."""
    same = document_ids_BT[:, :, None] == document_ids_BT[:, None, :]
    return same.tril()[:, None]


def _attend_documents(q_BTHK: Tensor, k_BSJK: Tensor, v_BSJK: Tensor, document_ids_BT: Tensor, scale: float) -> Tensor:
    batch, tokens = document_ids_BT.shape
    starts = torch.ones_like(document_ids_BT, dtype=torch.bool)
    starts[:, 1:] = document_ids_BT[:, 1:] != document_ids_BT[:, :-1]
    first = starts.reshape(-1).nonzero()[:, 0]
    if first.numel() == batch:
        return _attend(q_BTHK, k_BSJK, v_BSJK, None, scale, causal=True)
    if first.numel() * _SHORT_DOCUMENT_TOKENS > batch * tokens:
        return _attend(q_BTHK, k_BSJK, v_BSJK, _document_mask(document_ids_BT), scale, causal=False)
    lengths = first.diff(append=first.new_tensor([batch * tokens])).tolist()
    documents = zip(*(x.reshape(1, batch * tokens, *x.shape[2:]).split(lengths, 1) for x in (q_BTHK, k_BSJK, v_BSJK)))
    outputs = [_attend(q, k, v, None, scale, causal=True) for q, k, v in documents]
    return torch.cat(outputs, 1).view(q_BTHK.shape)
