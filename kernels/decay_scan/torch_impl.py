"""Decayed linear attention in chunks with PyTorch: wide matrix products, and a loop over chunks for the state only.

The derivation, with the names used here, is in README.md next to this file.

How: with b the sum of gates from the start of the document (or chunk), a chunk's outputs are ((q k^T) * L) v,
with L_ij = e^(b_i - b_j) u_j for j <= i, plus e^b (q S_in); the state that leaves is e^(b_end) S_in plus a
product of k and decayed v. All chunks are computed as one batch; only S_in needs a loop, and that is one
multiply-add a chunk. Forward saves scores and decays, [n, G or H, Q, Q], so that backward neither multiplies
nor takes powers for them again.

Masks of documents act on exponents (-inf), never on powers: between two documents an exponent has no bound.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from amfm.kernels.common.chunks import LOG2_E, Chunks, Documents, cut_documents, heads_first, tokens_first
from amfm.kernels.common.gemm_precision import gemm_dtype

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

    q and k [B, T, G, K], v [B, T, H, V], g and scale [B, T, H] (g <= 0, scale >= 0), skip [H], initial state
    [B, H, K, V]. Rows are padded to whole chunks with tokens of zeros, which change no state.
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
    s, wide = Chunks.of(B, T, H, G, K, V, chunk_size), g_BTH.dtype
    q, k = (heads_first(x, s).to(gemm) for x in (q_BTGK, k_BTGK))
    v, g = heads_first(v_BTHV, s).to(wide), heads_first(g_BTH, s)
    scaled = v if scale_BTH is None else v * heads_first(scale_BTH, s).unsqueeze(-1)
    documents = cut_documents(document_ids_BT, s, g)
    b = documents.sum_inside(g)
    decay_in_chunk = (b[..., :, None] - b[..., None, :] + documents.bias).clamp(max=0.0).exp()
    scores = torch.matmul(q, k.mT).to(wide)
    # Scores are shared by the R = H / G heads of a group, decays are each head's own.
    mixed = (decay_in_chunk.unflatten(1, (G, s.R)) * scores.unsqueeze(2)).flatten(1, 2).to(gemm)
    inside = torch.matmul(mixed, scaled.to(gemm)).to(wide)
    to_end = documents.keep_last(b[..., -1:] - b).exp().unsqueeze(-1)
    weighted = (scaled * to_end).unflatten(1, (G, s.R)).transpose(2, 3).flatten(3).to(gemm)
    local = torch.matmul(k.mT, weighted).to(wide).view(s.chunks, B, G, K, s.R, V)
    carry = documents.keep_carry(b[..., -1].exp()).view(s.chunks, B, G, 1, s.R, 1)
    if initial_state_BHKV is None:
        state = local.new_zeros(B, G, K, s.R, V)
    else:
        state = initial_state_BHKV.to(wide).view(B, G, s.R, K, V).transpose(2, 3)
    entering = []
    for c in range(s.chunks):
        entering.append(state)
        # The only sequential part: one factor a head, and what the chunk itself wrote.
        state = carry[c] * state + local[c]
    entered = torch.stack(entering).view(s.count, G, K, s.R * V).to(gemm)
    across = torch.matmul(q, entered).to(wide).unflatten(3, (s.R, V)).transpose(2, 3).flatten(1, 2)
    y = inside + across * documents.keep_first(b.exp()).unsqueeze(-1)
    if skip_H is not None:
        y = y + v * skip_H.to(wide).view(H, 1, 1)
    return tokens_first(y, s).to(v_BTHV.dtype), state.transpose(2, 3).reshape(B, H, K, V)


@dataclass
class _Setup:
    """What forward and backward both derive from the inputs; b is times log2(e), for powers of 2.

    Backward derives it again from the inputs, which autograd keeps alive anyway, instead of saving copies of
    them.
    """

    sizes: Chunks
    documents: Documents
    q: Tensor  # [n, G, Q, K]
    k: Tensor
    v: Tensor  # [n, H, Q, V]
    b: Tensor  # [n, H, Q]
    b_source: Tensor
    gemm: torch.dtype
    wide: torch.dtype

    def weights_to_end(self) -> Tensor:
        """exp(b_end - b_j) scale_j for tokens of the chunk's last document, [n, H, Q, 1]."""
        return self.documents.keep_last(self.b[..., -1:] - self.b_source).exp2_().unsqueeze(-1)

    def weights_from_start(self) -> Tensor:
        """exp(b_i) for tokens of the document that owns the entering state, [n, H, Q, 1]."""
        return self.documents.keep_first(self.b.exp2()).unsqueeze(-1)

    def carry(self) -> Tensor:
        """What is left at a chunk's end of the state that entered it, [chunks, B, G, 1, R, 1]."""
        s = self.sizes
        return self.documents.keep_carry(self.b[..., -1].exp2()).view(s.chunks, s.B, s.G, 1, s.R, 1)

    def decay_inside(self) -> Tensor:
        """exp(b_i - b_j) scale_j below the diagonal and inside a document, 0 elsewhere, [n, H, Q, Q]."""
        decay = self.b[..., :, None] - self.b_source[..., None, :]
        return decay.add_(self.documents.bias).exp2_()

    def mix(self, scores: Tensor, decay: Tensor) -> Tensor:
        """Scores of a group [n, G, Q, Q] times the decay of each head, [n, H, Q, Q]."""
        return (self.grouped(decay) * scores.unsqueeze(2)).flatten(1, 2)

    def grouped(self, x: Tensor) -> Tensor:
        """[n, H, ...] seen as [n, G, R, ...].

        A view; R is the number of heads that share a q and k.
        """
        return x.unflatten(1, (self.sizes.G, self.sizes.R))

    def by_head(self, x: Tensor) -> Tensor:
        """The heads of a group side by side, [n, G, Q, R V], seen as [n, G, R, Q, V].

        A view into the same memory, so that products with a group's shared operand are one wide product.
        """
        return x.unflatten(3, (self.sizes.R, self.sizes.V)).transpose(2, 3)

    def weigh(self, x: Tensor, weights: Tensor) -> Tensor:
        """x [n, H, Q, V] times weights [n, H, Q, 1], the heads of a group side by side: [n, G, Q, R V]."""
        s = self.sizes
        weighed = self.empty(len(x), s.G, s.Q, s.R * s.V)
        torch.mul(self.grouped(x), self.grouped(weights), out=self.by_head(weighed))
        return weighed

    def multiply(self, left: Tensor, right: Tensor) -> Tensor:
        """Products of matrices [n, heads, ...], of operands in `gemm`, in the wide dtype."""
        out = self.empty(*left.shape[:3], right.shape[3])
        self.multiply_into(out, left, right, beta=0.0)
        return out

    def multiply_into(self, out: Tensor, left: Tensor, right: Tensor, *, beta: float = 1.0) -> None:
        """out = beta out + left @ right."""
        out = out.view(out.shape[0] * out.shape[1], *out.shape[2:])  # raises where flatten would write into a copy
        left, right = left.flatten(0, 1).to(self.gemm), right.flatten(0, 1).to(self.gemm)
        if out.dtype == self.gemm:
            out.baddbmm_(left, right, beta=beta)
        elif beta == 0.0:
            out.copy_(torch.bmm(left, right))
        else:
            out.add_(torch.bmm(left, right))

    def empty(self, *shape: int) -> Tensor:
        """A tensor to be filled, in the wide dtype."""
        return torch.empty(shape, dtype=self.wide, device=self.b.device)

    def rows(self, x: Tensor, source: Tensor, skip: Tensor | None, dtype: torch.dtype) -> Tensor:
        """x [n, H, Q, V], plus skip times its source, as rows of tokens again: [B, T, H, V]."""
        s = self.sizes
        tokens = self.empty(s.B, s.chunks, s.Q, s.H, s.V)
        out = tokens.permute(1, 0, 3, 2, 4)
        if skip is None:
            out.copy_(x.view(out.shape))
        else:
            torch.addcmul(x.view(out.shape), source.view(out.shape), skip.to(self.wide).view(s.H, 1, 1), out=out)
        return tokens.flatten(1, 2)[:, : s.T].to(dtype).contiguous()


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
    """Cut q, k, v and g into chunks, sum the gates, and make the masks of documents."""
    B, T, H, V = v.shape
    G, K = q.shape[2:]
    s = Chunks.of(B, T, H, G, K, V, chunk_size)
    g = heads_first(g, s) * LOG2_E
    documents = cut_documents(documents_BT, s, g)
    b = documents.sum_inside(g)
    b_source = b
    if scale is not None:
        # A factor on v_j is a shift of its exponent: no pass over [Q, Q] or over v is spent on it.
        b_source = b - heads_first(scale, s).log2()
    # Moved and then widened: a single pass that does both takes half as long again.
    q, k, v = (heads_first(x, s).to(gemm) for x in (q, k, v))
    return _Setup(s, documents, q, k, v, b, b_source, gemm, g.dtype)


class _ChunkedScan(torch.autograd.Function):
    """`chunked_scan` with its gradient written out: saves the inputs, y, scores, decays and the states entering chunks."""

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
        scores, decay = setup.multiply(setup.q, setup.k.mT), setup.decay_inside()
        y = setup.multiply(setup.mix(scores, decay), setup.v)
        entering, final = _scan_states(setup, initial)
        entered = slice(s.B if initial is None else 0, None)
        across = setup.by_head(setup.multiply(setup.q[entered], entering[entered]))
        setup.grouped(y[entered]).addcmul_(across, setup.grouped(setup.weights_from_start()[entered]))
        ctx.save_for_backward(q, k, v, g, scale, skip, documents_BT, y, scores, decay, entering, final)
        ctx.chunk_size, ctx.gemm = chunk_size, gemm
        ctx.initial_dtype = None if initial is None else initial.dtype
        # A None gradient spares the products that only zeros would enter.
        ctx.set_materialize_grads(False)
        # The skip is kept apart from the saved y, whose gradient is a difference that a large skip would drown in rounding.
        rows = setup.rows(y, setup.v.to(setup.wide), skip, v.dtype)
        return rows, final.transpose(2, 3).clone(memory_format=torch.contiguous_format).view(s.B, s.H, s.K, s.V)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, d_final: Tensor | None) -> tuple[Tensor | None, ...]:
        return _backward(ctx, dy, d_final)


def _scan_states(setup: _Setup, initial: Tensor | None) -> tuple[Tensor, Tensor]:
    """States entering each chunk [n, G, K, R V] and the state after the last one [B, G, K, R, V].

    A chunk's own part is made where its leaving state will stand, which is where the next chunk's entering state stands.
    """
    s = setup.sizes
    states = setup.empty(s.count + s.B, s.G, s.K, s.R * s.V)
    weighted = setup.weigh(setup.v, setup.weights_to_end())
    setup.multiply_into(states[s.B :], setup.k.mT, weighted, beta=0.0)
    walked = states.view(s.chunks + 1, s.B, s.G, s.K, s.R, s.V)
    if initial is None:
        walked[0].zero_()
    else:
        walked[0].copy_(initial.view(s.B, s.G, s.R, s.K, s.V).transpose(2, 3))
    for before, after, carry in zip(walked[:-1], walked[1:], setup.carry(), strict=True):
        after.addcmul_(carry, before)
    return states[: s.count], walked[-1]


def _walk_back(setup: _Setup, states: Tensor, entering: Tensor, final: Tensor, d_final: Tensor | None) -> Tensor:
    """Gradient of b at each chunk's end, [n, H]; completes the gradients of the states in place.

    states: [n + B, G, K, R V]. On entry each of the first n holds what its own chunk adds to the gradient of
    the state that enters it; on return the whole gradient. The last B take the gradient of the final state, if
    it has one. If no initial state was given the first B are not used and may hold anything.
    """
    s = setup.sizes
    gradients = states.view(s.chunks + 1, s.B, s.G, s.K, s.R, s.V)
    if d_final is not None:
        gradients[-1].copy_(d_final.view(s.B, s.G, s.R, s.K, s.V).transpose(2, 3))
    left = [*entering.view(gradients[:-1].shape)[1:], final]
    carry = setup.carry()
    ends = torch.zeros(s.chunks, s.B, s.G, s.R, dtype=setup.wide, device=states.device)
    for c in reversed(range(s.chunks if d_final is not None else s.chunks - 1)):
        ends[c] = (left[c] * gradients[c + 1]).sum((2, 4))
        gradients[c].addcmul_(carry[c], gradients[c + 1])
    return ends.view(s.count, s.H)


def _through_states(
    setup: _Setup, dy: Tensor, entering: Tensor, final: Tensor, d_final: Tensor | None, has_initial: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """What gradients get through the states: of q, k [n, G, Q, K], v [n, H, Q, V], the initial state, and b at chunks' ends.

    Nothing enters a row's first chunk unless it was given, nothing that leaves its last one counts unless it has a gradient.
    """
    s, n = setup.sizes, setup.sizes.count
    # Chunks are as [chunks, B], so leaving out each row's first or last chunk is one slice.
    first, last = 0 if has_initial else s.B, n if d_final is not None else n - s.B
    states = setup.empty(n + s.B, s.G, s.K, s.R * s.V)
    dq, dk, dv = setup.empty(*setup.q.shape), setup.empty(*setup.k.shape), torch.empty_like(dy)
    dq[:first].zero_()
    dk[last:].zero_()
    dv[last:].zero_()
    from_start = setup.weigh(dy[first:], setup.weights_from_start()[first:])
    setup.multiply_into(states[first:n], setup.q[first:].mT, from_start, beta=0.0)
    setup.multiply_into(dq[first:], from_start, entering[first:].mT, beta=0.0)
    d_ends = _walk_back(setup, states, entering, final, d_final)
    leaving, to_end = states[s.B :][:last], setup.weights_to_end()[:last]
    setup.multiply_into(dk[:last], setup.weigh(setup.v[:last], to_end), leaving.mT, beta=0.0)
    across = setup.by_head(setup.multiply(setup.k[:last], leaving))
    torch.mul(across, setup.grouped(to_end), out=setup.grouped(dv[:last]))
    d_initial = None
    if has_initial:
        d_initial = states[: s.B].view(s.B, s.G, s.K, s.R, s.V).transpose(2, 3).reshape(s.B, s.H, s.K, s.V)
    return dq, dk, dv, d_initial, d_ends


def _backward(ctx: Any, dy: Tensor | None, d_final: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of the inputs of `_ChunkedScan.forward`; README.md, "Gradients", derives them."""
    q, k, v, g, scale, skip, documents_BT, y, scores, decay, entering, final = ctx.saved_tensors
    setup = _set_up(q, k, v, g, scale, documents_BT, ctx.chunk_size, ctx.gemm)
    s = setup.sizes
    dy = heads_first(torch.zeros_like(v) if dy is None else dy, s).to(setup.wide)
    has_initial = ctx.initial_dtype is not None
    dq, dk, dv, d_initial, d_ends = _through_states(setup, dy, entering, final, d_final, has_initial)

    setup.multiply_into(dv, setup.mix(scores, decay).mT, dy)
    d_mixed = setup.multiply(dy, setup.v.mT)
    # What a token's own v does to its output stands on the diagonal, before the decay.
    d_skip = None if skip is None else d_mixed.diagonal(dim1=2, dim2=3).sum((0, 2)).to(skip.dtype)
    d_scores = setup.grouped(d_mixed.mul_(decay))
    # q and k are shared by a group, so their scores collect the gradients of all its heads.
    d_scores = d_scores.sum(2) if s.R > 1 else d_scores[:, :, 0]
    setup.multiply_into(dq, d_scores, setup.k)
    setup.multiply_into(dk, d_scores.mT, setup.q)

    # Every exponent sits in a product with y_i (as b_i) or v_j (as -b_j), so two row sums give its gradient.
    into_source = (setup.v.to(setup.wide) * dv).sum(-1)
    d_b = (dy * y).sum(-1).sub_(into_source)
    d_b[..., -1] += d_ends
    dg = setup.documents.sum_inside_reversed(d_b)

    return (
        tokens_first(dq, s).to(q.dtype),
        tokens_first(dk, s).to(k.dtype),
        setup.rows(dv, dy, skip, v.dtype),
        tokens_first(dg, s),
        # The gradient of log u over u; a scale of zero wrote nothing, and its clamp keeps 0 / 0 out.
        None if scale is None else tokens_first(into_source, s) / scale.clamp(min=_TINY),
        d_skip,
        None if d_initial is None else d_initial.to(ctx.initial_dtype),
        None,
        None,
        None,
    )
