"""Causal grouped-query attention inside documents.

How: this file checks shapes and dispatches; `attention_reference` is the definition, one query at a time;
`torch_impl.py` calls PyTorch's scaled_dot_product_attention, `varlen.py` its FlashAttention over documents on a GPU,
`triton_impl.py` launches our kernels. Documents
and windows come as ids and a width rather than as a mask, because a mask of [T, S] grows with the square of the
row and keeps PyTorch from its flash kernels; from ids the Triton kernels derive exact loop bounds.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from torch import Tensor

from amfm.kernels.attention.log_sums import note_log_sums
from amfm.kernels.attention.torch_impl import attention_torch, window_attention_torch
from amfm.kernels.attention.varlen import DocumentEnds, attention_varlen, refuse_varlen
from amfm.kernels.common.inputs import check_documents, check_float, check_shape
from amfm.kernels.runtime.backend import resolve_backend
from amfm.kernels.runtime.compiling import assume_constant

_LOG = logging.getLogger(__name__)


def attention(
    q_BTHK: Tensor,
    k_BSJK: Tensor,
    v_BSJK: Tensor,
    *,
    sinks_H: Tensor | None = None,
    document_ids_BS: Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    document_ends: DocumentEnds | None = None,
    highest_H: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """softmax(scale * q k^T) v over the keys of the query's document up to the query itself, or the last `window` of them.

    Shapes: q [B, T, H, K], k and v [B, S, J, K] with J dividing H and S >= T -> [B, T, H, K]. The last T keys are those
    of the queries; S > T continues from a cache, or from the part of a row that other ranks hold. `document_ids_BS` are
    those of the keys, integers that do not decrease inside a row. `scale` defaults to K ** -0.5. Softmax and sums in
    float32 (float64 for float64). Sinks [H]: each is the score of one more key of its head, which has no value and which
    every query of every document sees. Backend "varlen" (`fastest_backend`) takes `document_ends` in place of ids, with
    those of keys where S > T, no sinks and no `highest_H`: a tensor [H], raised in place to the largest log-sum-exp of each
    head's queries, only of keys. Raises ValueError for wrong shapes and dtypes.
    Source: Dao 2023 (arXiv 2307.08691); Ainslie et al. 2023 (arXiv 2305.13245) for grouped queries; Beltagy et al. 2020
    (arXiv 2004.05150), section 3.1, for windows; OpenAI 2025 (arXiv 2508.10925), section 2.2, for sinks, after Miller 2023.
    """
    _check(q_BTHK, k_BSJK, v_BSJK, document_ids_BS)
    if sinks_H is not None:
        check_shape("sinks_H", sinks_H, (q_BTHK.shape[2],), q_BTHK)
        check_float("sinks_H", sinks_H)
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, the query's own key; got {window}")
    # A window as long as the row hides nothing, and full attention is the cheaper path.
    if window is not None and window >= k_BSJK.shape[1]:
        window = None
    scale = q_BTHK.shape[-1] ** -0.5 if scale is None else scale
    if backend == "varlen":
        if sinks_H is not None or highest_H is not None:
            raise ValueError('attention backend "varlen" has no sinks, and does not return its sums')
        if document_ends is None or (document_ends.key_offsets is None and q_BTHK.shape[1] != k_BSJK.shape[1]):
            raise ValueError(
                'attention backend "varlen" needs document_ends, with those of keys if there are more than queries'
            )
        return attention_varlen(q_BTHK, k_BSJK, v_BSJK, document_ends, scale, window)
    backend = resolve_backend(backend, q_BTHK.device, "attention")
    if backend == "triton":
        from amfm.kernels.attention.triton_impl import attention_triton

        return attention_triton(q_BTHK, k_BSJK, v_BSJK, document_ids_BS, scale, window, sinks_H, highest_H)
    if highest_H is not None:
        note_log_sums(highest_H, q_BTHK, k_BSJK, document_ids_BS=document_ids_BS, scale=scale, window=window)
    settings: dict[str, Any] = {"document_ids_BS": document_ids_BS, "scale": scale, "sinks_H": sinks_H}
    if backend == "reference":
        return attention_reference(q_BTHK, k_BSJK, v_BSJK, window=window, **settings)
    if window is not None:
        return window_attention_torch(q_BTHK, k_BSJK, v_BSJK, window=window, **settings)
    return attention_torch(q_BTHK, k_BSJK, v_BSJK, **settings)


def fastest_backend(
    backend: str,
    q_BTHK: Tensor,
    *,
    has_documents: bool,
    keys: int,
    document_ends: DocumentEnds | None = None,
    has_sinks: bool = False,
    gives_sums: bool = False,
) -> str:
    """Backend on which a model's attention runs where its kernels are to run on `backend`: that, "torch" or "varlen".

    Without document boundaries PyTorch's scaled_dot_product_attention runs FlashAttention or cuDNN on CUDA, faster than
    our kernel can be. With boundaries it would need a mask of all queries and keys and be kept from those kernels; its
    variable-length attention needs none, where the ends of documents are known, this release has it and it takes such heads
    (`refuse_varlen`). So it is with fewer queries than keys, of which a cache gives no ends. Else, and where library kernels are to be deterministic, ours runs, which
    skips what is hidden. Each choice is logged once with its reason. The meta device, which plans pass blocks on, stands for a GPU.
    """
    if backend != "triton" or q_BTHK.device.type == "cpu":
        return backend
    tokens = q_BTHK.shape[1]
    if has_sinks:
        note_choice("triton", "PyTorch's attention has no sinks; ours begins its sums with them")
        return backend
    if gives_sums:
        note_choice("triton", "PyTorch's attention keeps its log-sum-exp to itself; ours hands it out")
        return backend
    has_ends = document_ends is not None and (tokens == keys or document_ends.key_offsets is not None)
    if has_ends and (has_documents or tokens != keys):
        reason = refuse_varlen(q_BTHK.dtype, q_BTHK.shape[3])
        if reason is None:
            note_choice("varlen", "PyTorch's FlashAttention requires documents laid end to end")
            return "varlen"
        note_choice("triton", f"PyTorch's variable-length attention cannot serve: {reason}")
        return backend
    if has_documents or tokens not in (1, keys):
        note_choice("triton", "a mask would keep PyTorch's attention from FlashAttention; ours skips hidden tiles")
        return backend
    note_choice("torch", "without document boundaries PyTorch's FlashAttention is faster")
    return "torch"


@assume_constant
def note_choice(backend: str, reason: str) -> None:
    """As `_log_choice`, where torch.compile looks: a message would cut a graph in two."""
    _log_choice(backend, reason)


@functools.cache
def _log_choice(backend: str, reason: str) -> None:
    """Log a choice once, although every call makes it again."""
    _LOG.info("attention -> %s: %s", backend, reason)


def _check(q_BTHK: Tensor, k_BSJK: Tensor, v_BSJK: Tensor, document_ids_BS: Tensor | None) -> None:
    """Raise ValueError for shapes or dtypes that do not fit; no backend checks them again."""
    check_shape("q_BTHK", q_BTHK, (-1, -1, -1, -1))
    check_float("q_BTHK", q_BTHK)
    batch, tokens, heads, size = q_BTHK.shape
    check_shape("k_BSJK", k_BSJK, (batch, -1, -1, size), q_BTHK, "q_BTHK")
    check_float("k_BSJK", k_BSJK, q_BTHK)
    check_shape("v_BSJK", v_BSJK, tuple(k_BSJK.shape), q_BTHK, "k_BSJK")
    check_float("v_BSJK", v_BSJK, q_BTHK)
    keys, kv_heads = k_BSJK.shape[1:3]
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"key heads must divide the query heads; got {kv_heads} and {heads}")
    if keys < tokens:
        raise ValueError(f"keys must be at least as many as queries; got {keys} and {tokens}")
    check_documents(document_ids_BS, batch, keys, q_BTHK, name="document_ids_BS")


def attention_flops(batch: int, tokens: int, heads: int, head_dim: int, *, backward: bool) -> int:
    """Floating point operations of causal attention in one document: two products forward, five backward, half masked.

    A product of all pairs costs 2 T^2 K a head; five backward: the scores again, dv, dp, dq and dk.
    """
    return batch * heads * tokens * tokens * head_dim * (10 if backward else 4) // 2


def attention_bytes(
    batch: int, tokens: int, heads: int, kv_heads: int, head_dim: int, size: int, *, backward: bool
) -> int:
    """Least bytes: q, k, v read, y written; backward reads those and dy and writes three gradients.

    `size` is the bytes of one number. Scores never reach memory, so none are counted.
    """
    wide, narrow = batch * tokens * heads * head_dim, batch * tokens * kv_heads * head_dim
    return size * (4 * wide + 4 * narrow if backward else 2 * wide + 2 * narrow)


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
