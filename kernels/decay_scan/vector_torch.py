"""Decayed linear attention with a decay of each key channel, in chunks with PyTorch.

The derivation, with the names used here, is in README.md next to this file.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.chunks import pad_tokens
from kernels.gemm_precision import gemm_dtype


def chunked_vector_scan(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    g_BTHK: Tensor,
    initial_state_BHKV: Tensor | None,
    document_ids_BT: Tensor | None,
    chunk_size: int,
    product_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """o_t = S_t^T q_t with S_t = diag(e^(g_t)) S_(t-1) + k_t v_t^T, S = 0 before the first token of each document.

    Returns o [B, T, H, V] in the dtype of v and the last state [B, H, K, V] in float32 (float64 for float64 inputs).
    Matrix products take operands of `product_dtype`, by default what this machine multiplies fast.

    Raises ValueError unless the chunk size is a power of two.
    """
    if chunk_size & (chunk_size - 1):
        raise ValueError(f"chunk_size={chunk_size} must be a power of two for a vector gate; use 16, 32, 64 or 128")
    T = v_BTHV.shape[1]
    chunk_size = min(chunk_size, 1 << (T - 1).bit_length())
    products = gemm_dtype(v_BTHV) if product_dtype is None else product_dtype
    return compose_vector_scan(
        q_BTHK, k_BTHK, v_BTHV, g_BTHK, initial_state_BHKV, document_ids_BT, chunk_size, products
    )


def cut_gates(g_BTHK: Tensor, document_ids_BT: Tensor | None) -> Tensor:
    """Gates of -inf at the first token of each document but the row's first: nothing before it reaches past it.

    Exponents are sums of gates and never differences, so that -inf stays -inf and its power is an exact zero.
    """
    if document_ids_BT is None:
        return g_BTHK
    begins_BT = document_ids_BT[:, 1:] != document_ids_BT[:, :-1]
    begins_BT = torch.cat([torch.zeros_like(begins_BT[:, :1]), begins_BT], dim=1)
    return g_BTHK.masked_fill(begins_BT[..., None, None], -torch.inf)


def compose_vector_scan(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    g_BTHK: Tensor,
    initial_state_BHKV: Tensor | None,
    document_ids_BT: Tensor | None,
    chunk_size: int,
    gemm: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The same as `chunked_vector_scan` as a plain composition of differentiable operations, for the compiler."""
    (B, T, H, V), K, Q = v_BTHV.shape, q_BTHK.shape[3], chunk_size
    chunks = (T + Q - 1) // Q
    wide = g_BTHK.dtype
    cut = (q_BTHK.to(wide), k_BTHK.to(wide), v_BTHV, cut_gates(g_BTHK, document_ids_BT))
    padded = (pad_tokens(x, chunks * Q - T) for x in cut)
    q, k, v, g = (x.view(B, chunks, Q, H, -1).transpose(2, 3) for x in padded)
    scores = (q * k).sum(-1)[..., None, None]
    from_start, to_end = g[..., None, :], torch.zeros_like(g)[..., None, :]
    size = 1
    while size < Q:
        shape = (B, chunks, H, Q // (2 * size), 2, size, -1)
        scores, starts, ends = (x.reshape(shape) for x in (scores, from_start, to_end))
        queries = q.reshape(shape)[..., 1, :, :] * starts[..., 1, :, :].exp()
        keys = k.reshape(shape)[..., 0, :, :] * ends[..., 0, :, :].exp()
        across = torch.matmul(queries.to(gemm), keys.to(gemm).transpose(-1, -2)).to(wide)
        upper = torch.cat([scores[..., 0, :, :], torch.zeros_like(across)], dim=-1)
        scores = torch.cat([upper, torch.cat([across, scores[..., 1, :, :]], dim=-1)], dim=-2)
        whole = starts[..., -1:, :]
        from_start = torch.cat([starts[..., 0, :, :], starts[..., 1, :, :] + whole[..., 0, :, :]], dim=-2)
        to_end = torch.cat([ends[..., 0, :, :] + whole[..., 1, :, :], ends[..., 1, :, :]], dim=-2)
        size *= 2
    scores, from_start, to_end = (x.view(B, chunks, H, Q, -1) for x in (scores, from_start, to_end))
    local = torch.matmul((k * to_end.exp()).to(gemm).transpose(-1, -2), v.to(gemm)).to(wide)
    carry = from_start[..., -1, :, None].exp()
    state = local.new_zeros(B, H, K, V) if initial_state_BHKV is None else initial_state_BHKV.to(wide)
    entering = []
    for c in range(chunks):
        entering.append(state)
        state = carry[:, c] * state + local[:, c]
    entered = torch.stack(entering, dim=1).to(gemm)
    o = torch.matmul(scores.to(gemm), v.to(gemm)).to(wide)
    o = o + torch.matmul((q * from_start.exp()).to(gemm), entered).to(wide)
    return o.transpose(2, 3).reshape(B, chunks * Q, H, V)[:, :T].to(v_BTHV.dtype), state
