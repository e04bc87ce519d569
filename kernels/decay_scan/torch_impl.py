"""Decayed linear attention in chunks with PyTorch: wide matrix products, and a loop over chunks for the state only.

The derivation, with the names used here, is in README.md next to this file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.chunks import Chunks, Documents, cut_documents, pad_tokens
from kernels.gemm_precision import gemm_dtype

_TINY = 1e-30


def chunked_scan(
    q_BTGK: Tensor,
    k_BTGK: Tensor,
    v_BTHV: Tensor,
    g_BTH: Tensor,
    scale_BTH: Tensor | None,
    skip_H: Tensor | None,
    initial_state_BHKV: Tensor | None,
    document_ids_BT: Tensor | None,
    chunk_size: int,
    product_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """o_t = S_t^T q_t + skip v_t with S_t = e^(g_t) S_(t-1) + scale_t k_t v_t^T; q and k are shared by H / G heads.

    Returns o [B, T, H, V] in the dtype of v and the last state [B, H, K, V] in float32 (float64 for float64 inputs).
    Matrix products take operands of `product_dtype`, by default what this machine multiplies fast.
    Under torch.compile the plain composition runs, which Inductor fuses; otherwise a hand-written backward.
    """
    chunk_size = min(chunk_size, v_BTHV.shape[1])
    products = gemm_dtype(v_BTHV) if product_dtype is None else product_dtype
    rows = (q_BTGK, k_BTGK, v_BTHV, g_BTH, scale_BTH)
    arguments = (*rows, skip_H, initial_state_BHKV, document_ids_BT, chunk_size, products)
    if torch.compiler.is_compiling():
        return compose_scan(*arguments)
    return _ChunkedScan.apply(*arguments)


def compose_scan(
    q_BTGK: Tensor,
    k_BTGK: Tensor,
    v_BTHV: Tensor,
    g_BTH: Tensor,
    scale_BTH: Tensor | None,
    skip_H: Tensor | None,
    initial_state_BHKV: Tensor | None,
    document_ids_BT: Tensor | None,
    chunk_size: int,
    gemm: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The same as `chunked_scan` as a plain composition of differentiable operations, for the compiler."""
    B, T, H, V = v_BTHV.shape
    G, K = q_BTGK.shape[2:]
    Q, R = chunk_size, H // G
    sizes = Chunks.of(B, T, H, G, K, V, Q)
    n = sizes.count
    wide = g_BTH.dtype
    q, k, v, g = (pad_tokens(x, sizes.padding) for x in (q_BTGK, k_BTGK, v_BTHV, g_BTH))
    q = q.reshape(n, Q, G, K).transpose(1, 2).to(gemm)
    k = k.reshape(n, Q, G, K).transpose(1, 2).to(gemm)
    v = v.reshape(n, Q, G, R, V).to(wide)
    scaled = v if scale_BTH is None else v * pad_tokens(scale_BTH, sizes.padding).reshape(n, Q, G, R, 1)
    g = g.reshape(n, Q, H).transpose(1, 2)
    documents = cut_documents(document_ids_BT, sizes, g)
    b = documents.sum_inside(g)
    decay_in_chunk = (b[..., :, None] - b[..., None, :] + documents.bias).clamp(max=0.0).exp()
    scores = torch.matmul(q, k.transpose(-1, -2)).to(wide)
    mixed = (decay_in_chunk.view(n, G, R, Q, Q) * scores[:, :, None]).to(gemm)
    inside = torch.matmul(mixed, scaled.permute(0, 2, 3, 1, 4).to(gemm)).to(wide)
    to_end = documents.keep_last(b[..., -1:] - b).exp().transpose(1, 2).reshape(n, Q, G, R, 1)
    weighted = (scaled * to_end).permute(0, 2, 1, 3, 4).reshape(n, G, Q, R * V).to(gemm)
    local = torch.matmul(k.transpose(-1, -2), weighted).to(wide).view(B, sizes.chunks, G, K, R, V)
    carry = documents.keep_carry(b[..., -1].exp()).view(B, sizes.chunks, G, 1, R, 1)
    if initial_state_BHKV is None:
        state = local.new_zeros(B, G, K, R, V)
    else:
        state = initial_state_BHKV.to(wide).view(B, G, R, K, V).transpose(2, 3)
    entering = []
    for c in range(sizes.chunks):
        entering.append(state)
        state = carry[:, c] * state + local[:, c]
    entered = torch.stack(entering, dim=1).view(n, G, K, R * V).to(gemm)
    across = torch.matmul(q, entered).to(wide).view(n, G, Q, R, V)
    from_start = documents.keep_first(b.exp()).view(n, G, R, Q).transpose(2, 3)
    y = inside.permute(0, 3, 1, 2, 4) + (across * from_start[..., None]).transpose(1, 2)
    if skip_H is not None:
        y = y + v * skip_H.to(wide).view(G, R, 1)
    y = y.reshape(B, sizes.chunks * Q, H, V)[:, :T]
    return y.to(v_BTHV.dtype), state.transpose(2, 3).reshape(B, H, K, V)


@dataclass
class _Setup:
    """What forward and backward both derive from the inputs."""

    sizes: Chunks
    documents: Documents
    q: Tensor
    k: Tensor
    v: Tensor
    b: Tensor
    b_source: Tensor
    gemm: torch.dtype
    wide: torch.dtype

    def weights_to_end(self) -> Tensor:
        """exp(b_end - b_j) scale_j for tokens of the chunk's last document, [n, Q, H, 1]."""
        weights = self.documents.keep_last(self.b[..., -1:] - self.b_source).exp_()
        return weights.transpose(1, 2).unsqueeze(-1)

    def weights_from_start(self) -> Tensor:
        """exp(b_i) for tokens of the document that owns the entering state, [n, Q, H, 1]."""
        return self.documents.keep_first(self.b.exp()).transpose(1, 2).unsqueeze(-1)

    def decay_inside(self) -> Tensor:
        """exp(b_i - b_j) scale_j below the diagonal and inside a document, 0 elsewhere, [n, H, Q, Q]."""
        decay = self.b[..., :, None] - self.b_source[..., None, :]
        return decay.add_(self.documents.bias).exp_()

    def mix(self, decay: Tensor) -> Tensor:
        """(q_i . k_j) times the decay, with the product taken once a group, [n, H, Q, Q]."""
        s = self.sizes
        scores = decay.new_empty(s.count, s.G, s.Q, s.Q)
        for g in range(s.G):
            _multiply(scores[:, g], self.q[:, :, g], self.k[:, :, g].transpose(1, 2), self.gemm)
        shape = (s.count, s.G, s.R, s.Q, s.Q)
        return (decay.view(shape) * scores[:, :, None]).view(decay.shape).to(self.gemm)


def _set_up(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: Tensor | None,
    documents_BT: Tensor | None,
    chunk_size: int,
    gemm: torch.dtype,
) -> _Setup:
    B, T, H, V = v.shape
    G, K = q.shape[2:]
    sizes = Chunks.of(B, T, H, G, K, V, chunk_size)
    n, Q = sizes.count, sizes.Q
    wide = g.dtype
    q, k, v = (pad_tokens(x, sizes.padding).to(gemm).contiguous() for x in (q, k, v))
    g = pad_tokens(g, sizes.padding).view(n, Q, H).transpose(1, 2).contiguous()
    documents = cut_documents(documents_BT, sizes, g)
    b = documents.sum_inside(g)
    b_source = b
    if scale is not None:
        # A factor on v_j is a shift of its exponent: no pass over [Q, Q] or over v is spent on it.
        b_source = b - pad_tokens(scale, sizes.padding).view(n, Q, H).transpose(1, 2).log()
    return _Setup(
        sizes, documents, q.view(n, Q, G, K), k.view(n, Q, G, K), v.view(n, Q, H * V), b, b_source, gemm, wide
    )


def _multiply(out: Tensor, left: Tensor, right: Tensor, gemm: torch.dtype, beta: float = 0.0) -> None:
    """out = beta out + left @ right for batches of matrices that may be strided views; operands are cast to `gemm`."""
    left, right = left.to(gemm), right.to(gemm)
    if out.dtype == gemm:
        out.baddbmm_(left, right, beta=beta)
    elif beta == 0.0:
        out.copy_(torch.bmm(left, right))
    else:
        out.add_(torch.bmm(left, right))


class _ChunkedScan(torch.autograd.Function):
    """`chunked_scan` with its gradient written out: saves the inputs, y, the decays and the states entering chunks."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        scale: Tensor | None,
        skip: Tensor | None,
        initial: Tensor | None,
        documents_BT: Tensor | None,
        chunk_size: int,
        gemm: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        setup = _set_up(q, k, v, g, scale, documents_BT, chunk_size, gemm)
        s = setup.sizes
        decay = setup.decay_inside()
        mixed = setup.mix(decay)
        entering, final = _scan_states(setup, initial)
        y = torch.empty(s.count, s.Q, s.H * s.V, dtype=setup.wide, device=v.device)
        for i in range(s.G):
            _multiply(y[:, :, s.group(i)], setup.q[:, :, i], entering[:, i], setup.gemm)
        y_heads = y.view(s.count, s.Q, s.H, s.V)
        y_heads.mul_(setup.weights_from_start())
        for h in range(s.H):
            _multiply(y[:, :, s.head(h)], mixed[:, h], setup.v[:, :, s.head(h)], setup.gemm, beta=1.0)
        saved_y = y = y_heads.view(s.B, s.chunks * s.Q, s.H, s.V)
        if skip is not None:
            # Kept apart from the saved y, whose gradient is a difference that a large skip would drown in rounding.
            y = torch.addcmul(y, setup.v.view_as(y).to(setup.wide), skip.to(setup.wide).view(s.H, 1))
        y = y[:, : s.T].to(v.dtype)
        if s.padding:
            y = y.contiguous()
        ctx.save_for_backward(q, k, v, g, scale, skip, documents_BT, saved_y, decay, entering, final)
        ctx.chunk_size, ctx.gemm = chunk_size, gemm
        ctx.initial_dtype = None if initial is None else initial.dtype
        ctx.set_materialize_grads(False)
        final_state = final.view(s.B, s.G, s.K, s.R, s.V).transpose(2, 3).reshape(s.B, s.H, s.K, s.V)
        return y, final_state.clone() if final_state.data_ptr() == final.data_ptr() else final_state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, d_final: Tensor | None) -> tuple[Tensor | None, ...]:
        return _backward(ctx, dy, d_final)


def _scan_states(setup: _Setup, initial: Tensor | None) -> tuple[Tensor, Tensor]:
    """States entering each chunk [n, G, K, R V] and the state after the last one [B, G, K, R V]."""
    s = setup.sizes
    weighted = setup.v.view(s.count, s.Q, s.H, s.V) * setup.weights_to_end()
    weighted = weighted.view(s.count, s.Q, s.H * s.V)
    local = torch.empty(s.count, s.G, s.K, s.R * s.V, dtype=setup.wide, device=weighted.device)
    for i in range(s.G):
        _multiply(local[:, i], setup.k[:, :, i].transpose(1, 2), weighted[:, :, s.group(i)], setup.gemm)
    local = local.view(s.B, s.chunks, s.G, s.K, s.R, s.V)
    carry = setup.documents.keep_carry(setup.b[..., -1].exp()).view(s.B, s.chunks, s.G, 1, s.R, 1)
    entering = torch.empty_like(local)
    if initial is None:
        entering[:, 0].zero_()
    else:
        entering[:, 0].copy_(initial.view(s.B, s.G, s.R, s.K, s.V).transpose(2, 3))
    for c in range(s.chunks - 1):
        torch.addcmul(local[:, c], carry[:, c], entering[:, c], out=entering[:, c + 1])
    final = torch.addcmul(local[:, -1], carry[:, -1], entering[:, -1])
    return entering.view(s.count, s.G, s.K, s.R * s.V), final.view(s.B, s.G, s.K, s.R * s.V)


def _walk_back(setup: _Setup, d_local: Tensor, d_final: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gradients of the states leaving each chunk (in place of `d_local`, those entering) and of the initial state."""
    s = setup.sizes
    shape = (s.B, s.chunks, s.G, s.K, s.R, s.V)
    d_local = d_local.view(shape)
    carry = setup.documents.keep_carry(setup.b[..., -1].exp()).view(s.B, s.chunks, s.G, 1, s.R, 1)
    leaving = torch.empty_like(d_local)
    if d_final is None:
        leaving[:, -1].zero_()
    else:
        leaving[:, -1].copy_(d_final.view(s.B, s.G, s.R, s.K, s.V).transpose(2, 3))
    for c in range(s.chunks - 1, 0, -1):
        torch.addcmul(d_local[:, c], carry[:, c], leaving[:, c], out=leaving[:, c - 1])
    d_initial = torch.addcmul(d_local[:, 0], carry[:, 0], leaving[:, 0])
    return leaving.view(s.count, s.G, s.K, s.R * s.V), d_initial.transpose(2, 3).reshape(s.B, s.H, s.K, s.V)


def _backward(ctx: Any, dy: Tensor | None, d_final: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, g, scale, skip, documents_BT, y, decay, entering, final = ctx.saved_tensors
    setup = _set_up(q, k, v, g, scale, documents_BT, ctx.chunk_size, ctx.gemm)
    s, gemm, wide = setup.sizes, setup.gemm, setup.wide
    n, Q, heads = s.count, s.Q, (s.count, s.Q, s.H, s.V)
    if dy is None:
        dy = torch.zeros_like(v)
    dy = pad_tokens(dy, s.padding).contiguous().view(n, Q, s.H * s.V)
    dy_gemm = dy.to(gemm)
    dy_wide = dy.to(wide).view(heads)
    v_wide = setup.v.to(wide).view(heads)

    from_start = (dy_wide * setup.weights_from_start()).view(n, Q, s.H * s.V).to(gemm)
    d_entering = torch.empty(n, s.G, s.K, s.R * s.V, dtype=wide, device=v.device)
    dq = torch.empty(n, Q, s.G, s.K, dtype=wide, device=v.device)
    for i in range(s.G):
        _multiply(d_entering[:, i], setup.q[:, :, i].transpose(1, 2), from_start[:, :, s.group(i)], gemm)
        _multiply(dq[:, :, i], from_start[:, :, s.group(i)], entering[:, i].transpose(1, 2), gemm)
    leaving, d_initial = _walk_back(setup, d_entering, d_final)

    to_end = setup.weights_to_end()
    weighted = (v_wide * to_end).view(n, Q, s.H * s.V).to(gemm)
    dv = torch.empty(n, Q, s.H * s.V, dtype=wide, device=v.device)
    dk = torch.empty_like(dq)
    for i in range(s.G):
        _multiply(dv[:, :, s.group(i)], setup.k[:, :, i], leaving[:, i], gemm)
        _multiply(dk[:, :, i], weighted[:, :, s.group(i)], leaving[:, i].transpose(1, 2), gemm)
    dv.view(heads).mul_(to_end)
    mixed = setup.mix(decay)
    d_mixed = torch.empty(n, s.H, Q, Q, dtype=wide, device=v.device)
    for h in range(s.H):
        _multiply(dv[:, :, s.head(h)], mixed[:, h].transpose(1, 2), dy_gemm[:, :, s.head(h)], gemm, beta=1.0)
        _multiply(d_mixed[:, h], dy_gemm[:, :, s.head(h)], setup.v[:, :, s.head(h)].transpose(1, 2), gemm)
    d_scores = d_mixed.mul_(decay).view(n, s.G, s.R, Q, Q)
    d_scores = d_scores.sum(2) if s.R > 1 else d_scores[:, :, 0]
    for i in range(s.G):
        _multiply(dq[:, :, i], d_scores[:, i], setup.k[:, :, i], gemm, beta=1.0)
        _multiply(dk[:, :, i], d_scores[:, i].transpose(1, 2), setup.q[:, :, i], gemm, beta=1.0)

    # Every exponent sits in a product with y_i (as b_i) or v_j (as -b_j), so two row sums give its gradient.
    dv_heads = dv.view(heads)
    into_source = (v_wide * dv_heads).sum(-1)
    d_b = (dy_wide * y.view(heads)).sum(-1).sub_(into_source)
    d_skip = None
    if skip is not None:
        through_skip = (dy_wide * v_wide).sum(-1)
        d_skip = through_skip.sum((0, 1)).to(skip.dtype)
        dv_heads.addcmul_(dy_wide, skip.to(wide).view(s.H, 1))
    d_b = d_b.transpose(1, 2).contiguous()
    d_b[..., -1] += _end_gradient(s, entering, final, leaving)
    dg = setup.documents.sum_inside_reversed(d_b).transpose(1, 2).reshape(s.B, s.chunks * Q, s.H)[:, : s.T]
    d_scale = None
    if scale is not None:
        d_scale = into_source.view(s.B, s.chunks * Q, s.H)[:, : s.T] / scale.clamp(min=_TINY)

    def trim(gradient: Tensor, like: Tensor) -> Tensor:
        return gradient.view(s.B, s.chunks * Q, *like.shape[2:])[:, : s.T].to(like.dtype)

    return (
        trim(dq, q),
        trim(dk, k),
        trim(dv, v),
        dg,
        d_scale,
        d_skip,
        None if ctx.initial_dtype is None else d_initial.to(ctx.initial_dtype),
        None,
        None,
        None,
    )


def _end_gradient(s: Chunks, entering: Tensor, final: Tensor, leaving: Tensor) -> Tensor:
    """Gradient of b at each chunk's end, [n, H]: the state that leaves the chunk times its gradient."""
    shape = (s.B, s.chunks, s.G, s.K, s.R, s.V)
    entering, leaving = entering.view(shape), leaving.view(shape)
    ends = torch.empty(s.B, s.chunks, s.H, dtype=leaving.dtype, device=leaving.device)
    ends[:, -1] = (final.view(s.B, s.G, s.K, s.R, s.V) * leaving[:, -1]).sum((2, 4)).view(s.B, s.H)
    if s.chunks > 1:
        ends[:, :-1] = (entering[:, 1:] * leaving[:, :-1]).sum((3, 5)).view(s.B, s.chunks - 1, s.H)
    return ends.view(s.count, s.H)
