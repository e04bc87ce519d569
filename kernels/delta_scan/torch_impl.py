"""The gated delta product in chunks with PyTorch, a few chunks of a few rows at a time, so that a processor's cache holds them.

The derivation, with the names used here, is in README.md next to this file.

How: rows are cut into pieces of about 64 matrices a thread, and a piece is finished before the next one starts:
whole tensors of [n, H, M, M] would pass through memory between any two operations. The state is handed from
piece to piece. Forward keeps the inverses, errors and entering states; scores are made again in backward,
except those of gates per channel, which cost a product for each level.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from amfm.kernels.common.chunks import cut_gates
from amfm.kernels.delta_scan.terms import Terms, invert_unit_lower
from amfm.kernels.delta_scan.vector.terms import ScoreSums, VectorTerms

# Matrices [Q, Q N] of a piece for each thread: enough that a call costs little compared with its work, few enough to
# stay in the cache.
_MATRICES = 64


def chunked_delta(
    q_BTGK: Tensor,
    k_BTNGK: Tensor,
    v_BTNHV: Tensor,
    beta_BTNH: Tensor,
    g_BTH: Tensor | None,
    initial_state_BHKV: Tensor | None,
    document_ids_BT: Tensor | None,
    chunk_size: int,
    erase_BTHK: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`delta_by_steps` in chunks of `chunk_size` steps; beta, g and the state are float32 (float64 for float64 inputs).

    g may be [B, T, H, K], a gate per key channel: then N = 1, G = H and the chunk size is a power of two. Returns o [B,
    T, H, V] in the dtype of v and the last state [B, H, K, V]. Products are float32 whatever the inputs are. Under
    torch.compile the plain composition runs, which Inductor fuses; otherwise a hand-written backward.

    Shapes as in `delta_scan`: q [B, T, G, K], k [B, T, N, G, K], v [B, T, N, H, V], beta [B, T, N, H], g [B, T,
    H].
    """
    chunk_tokens = max(1, chunk_size // v_BTNHV.shape[2])
    if g_BTH is not None and g_BTH.dim() == 4:
        g_BTH = cut_gates(g_BTH, document_ids_BT)
    rows = (q_BTGK, k_BTNGK, v_BTNHV, beta_BTNH, g_BTH)
    arguments = (*rows, initial_state_BHKV, document_ids_BT, chunk_tokens, erase_BTHK)
    if torch.compiler.is_compiling():
        return compose_delta(*arguments)
    return _ChunkedDelta.apply(*arguments)


def compose_delta(
    q_BTGK: Tensor,
    k_BTNGK: Tensor,
    v_BTNHV: Tensor,
    beta_BTNH: Tensor,
    g_BTH: Tensor | None,
    initial_state_BHKV: Tensor | None,
    document_ids_BT: Tensor | None,
    chunk_tokens: int,
    erase_BTHK: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same as `chunked_delta` as a plain composition of differentiable operations, for the compiler."""
    B, _, _, H, V = v_BTNHV.shape
    terms: Terms | VectorTerms
    if g_BTH is not None and g_BTH.dim() == 4:
        terms = VectorTerms.of(
            q_BTGK, k_BTNGK, v_BTNHV, beta_BTNH, g_BTH, chunk_tokens, composed=True, erase_BTHK=erase_BTHK
        )
    else:
        terms = Terms.of(q_BTGK, k_BTNGK, v_BTNHV, beta_BTNH, g_BTH, document_ids_BT, chunk_tokens)
    strict = (terms.interactions() * terms.beta.mT).tril(-1)
    identity = torch.eye(strict.shape[-1], dtype=strict.dtype, device=strict.device)
    # Of all chunks at once, before the loop: it does not depend on the state.
    inverse = torch.linalg.solve_triangular(strict + identity, identity.expand_as(strict), upper=False)
    into, out_of, carry = terms.from_start(terms.asked), terms.to_end(terms.k).mT, terms.carry()
    if initial_state_BHKV is None:
        state = terms.v.new_zeros(B, H, q_BTGK.shape[-1], V)
    else:
        state = initial_state_BHKV.to(terms.v.dtype)
    entering, changes = [], []
    for c in range(terms.sizes.chunks):
        entering.append(state)
        changes.append(terms.beta[c] * (inverse[c] @ (terms.v[c] - into[c] @ state)))
        # Three products per chunk wait for the state: what keys find, the errors, and what they write.
        state = carry[c] * state + out_of[c] @ changes[-1]
    o = terms.from_start(terms.q) @ torch.stack(entering) + terms.mix() @ torch.stack(changes)
    return terms.tokens_first(o).to(v_BTNHV.dtype), state


class _Piece(NamedTuple):
    """A block of rows and some of their chunks, which are computed together.

    Forward and backward must cut alike, because backward pops what forward kept in order.
    """

    rows: slice
    tokens: slice

    def terms(
        self, inputs: Sequence[Tensor | None], chunk_tokens: int, scores: Tensor | None = None
    ) -> Terms | VectorTerms:
        """Terms of this piece of (q, k, v, beta, g, erase, document ids); of gates per channel with the scores from
        forward.
        """
        q, k, v, beta, g, erase, documents = (None if x is None else x[self.rows, self.tokens] for x in inputs)
        assert q is not None and k is not None and v is not None and beta is not None, "only gates may be absent"
        if g is not None and g.dim() == 4:
            return VectorTerms.of(q, k, v, beta, g, chunk_tokens, scores, erase_BTHK=erase)
        return Terms.of(q, k, v, beta, g, documents, chunk_tokens)

    def resume(self, state_BHKV: Tensor, document_ids_BT: Tensor | None) -> Tensor:
        """The state before the piece (or its gradient) where the piece continues with the document before it, else 0.

        Inside a piece the masks of `Terms` cut documents; a boundary between two pieces is in neither.
        """
        start = self.tokens.start
        if document_ids_BT is None or start == 0:
            return state_BHKV
        ids_BT = document_ids_BT[self.rows]
        continues_B = ids_BT[:, start] == ids_BT[:, start - 1]
        return torch.where(continues_B.view(-1, 1, 1, 1), state_BHKV, torch.zeros_like(state_BHKV))


def _cut_pieces(v_BTNHV: Tensor, chunk_tokens: int, matrices: int) -> list[list[_Piece]]:
    """Blocks of rows, each as its pieces of about this many matrices in order."""
    B, T, _, H, _ = v_BTNHV.shape
    rows = max(1, min(B, matrices // H))
    tokens = chunk_tokens * max(1, matrices // (rows * H))
    blocks = [slice(row, min(row + rows, B)) for row in range(0, B, rows)]
    return [[_Piece(block, slice(at, min(at + tokens, T))) for at in range(0, T, tokens)] for block in blocks]


class _Walked(NamedTuple):
    """What backward needs of a piece: inverses [c, B, H, M, M], errors [.., M, V], entering states [.., K, V].

    scores: of gates per channel, whose products are dear, those of `VectorTerms`; else None.

    Kept in the wide dtype, one entry a piece, in the order of forward.
    """

    inverse: Tensor
    errors: Tensor
    entering: Tensor
    scores: Tensor | None


class _ChunkedDelta(torch.autograd.Function):
    """`chunked_delta` with its gradient written out: saves inputs, o, and each piece's inverses, errors and states."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        beta: Tensor,
        g: Tensor | None,
        initial: Tensor | None,
        documents_BT: Tensor | None,
        chunk_tokens: int,
        erase: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        inputs = (q, k, v, beta, g, erase, documents_BT)
        B, T, _, H, V = v.shape
        o = torch.empty(B, T, H, V, dtype=beta.dtype, device=v.device)
        final = torch.empty(B, H, q.shape[-1], V, dtype=beta.dtype, device=v.device)
        # Flat, because autograd keeps tensors, not tuples of them.
        walked: list[Tensor | None] = []
        matrices = _MATRICES * torch.get_num_threads()
        for pieces in _cut_pieces(v, chunk_tokens, matrices):
            rows = pieces[0].rows
            state = torch.zeros_like(final[rows]) if initial is None else initial[rows].to(final.dtype)
            for piece in pieces:
                terms = piece.terms(inputs, chunk_tokens)
                state = piece.resume(state, documents_BT)
                o[piece.rows, piece.tokens], state, saved = _walk(terms, state)
                walked += saved
            final[rows] = state
        # o and final in the wide dtype: the gate's gradient is made of <do, o> and of the states that leave
        # chunks.
        ctx.save_for_backward(*inputs, o, final, *walked)
        ctx.chunk_tokens, ctx.matrices = chunk_tokens, matrices
        ctx.initial_dtype = None if initial is None else initial.dtype
        ctx.set_materialize_grads(False)
        return o.to(v.dtype), final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_o: Tensor | None, d_final: Tensor | None) -> tuple[Tensor | None, ...]:
        return _backward(ctx, d_o, d_final)


def _walk(terms: Terms | VectorTerms, state: Tensor) -> tuple[Tensor, Tensor, _Walked]:
    """o [B, T, H, V] of a piece, the state after it, and what its backward needs.

    Rows with few heads have many chunks of few matrices, where each call counts: the loop has only what must wait for a state.

    State [B, H, K, V] of the piece's rows. With errors r and changes u = beta r: r = X (v - e^b k S), o = e^b q
    S + P u.
    """
    strict = terms.interactions().mul_(terms.beta.mT)
    inverse = invert_unit_lower(strict.flatten(0, 2)).view_as(strict)
    errors = torch.empty_like(terms.v)
    entering, last = state.new_empty(terms.sizes.chunks, *state.shape), state.new_empty(state.shape)
    entering[0] = state
    chunks = zip(
        *map(_by_chunk, (terms.v, terms.from_start(terms.asked), inverse, errors)),
        _by_chunk((terms.to_end(terms.k) * terms.beta).mT),
        _by_chunk(terms.carry().expand(-1, *state.shape[:2], -1, -1)),
        itertools.pairwise((*_by_chunk(entering), last.flatten(0, 1))),
        strict=True,
    )
    for v, into, solve, error, out_of, carry, (before, after) in chunks:
        torch.bmm(solve, torch.baddbmm(v, into, before, alpha=-1.0), out=error)
        torch.baddbmm(carry * before, out_of, error, out=after)
    changes = errors * terms.beta
    o = _add_product(torch.matmul(terms.from_start(terms.q), entering), terms.mix(), changes)
    scores = terms.scores if isinstance(terms, VectorTerms) else None
    return terms.tokens_first(o), last, _Walked(inverse, errors, entering, scores)


def _walk_back(
    terms: Terms | VectorTerms, walked: _Walked, d_o: Tensor, d_state: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of changes, of v, of the states leaving chunks (shaped as errors and entering), and of the first state.

    The transposes of `_walk`'s products in reverse order; only what waits for the leaving state's gradient is
    in the loop.
    """
    d_changes = torch.matmul(terms.mix().mT, d_o)
    d_entering = torch.matmul(terms.from_start(terms.q).mT, d_o)
    d_v = torch.empty_like(d_changes)
    d_states = d_entering.new_empty(terms.sizes.chunks + 1, *d_state.shape)
    d_states[-1] = d_state
    chunks = zip(
        *map(_by_chunk, (d_changes, d_entering, d_v, terms.to_end(terms.k))),
        _by_chunk((walked.inverse * terms.beta).mT),
        _by_chunk(terms.from_start(terms.asked).mT),
        _by_chunk(terms.carry().expand(-1, *d_state.shape[:2], -1, -1)),
        itertools.pairwise(_by_chunk(d_states)),
        strict=True,
    )
    for d_change, d_own, d_value, out_of, solve, into, carry, (before, after) in reversed(list(chunks)):
        d_change.baddbmm_(out_of, after)
        torch.bmm(solve, d_change, out=d_value)
        torch.baddbmm(torch.addcmul(d_own, carry, after), into, d_value, alpha=-1.0, out=before)
    return d_changes, d_v, d_states[1:], d_states[0]


def _by_chunk(x_cBH: Tensor) -> tuple[Tensor, ...]:
    """[c, B, H, X, Y] as c matrices [B H, X, Y], which share its memory where they can."""
    return x_cBH.flatten(1, 2).unbind(0)


def _add_product(to: Tensor, left: Tensor, right: Tensor, factor: float = 1.0) -> Tensor:
    """Add factor left @ right to `to`, in place."""
    to.view(-1, *to.shape[-2:]).baddbmm_(left.flatten(0, -3), right.flatten(0, -3), alpha=factor)
    return to


class _Gradients(NamedTuple):
    """Gradients of the inputs, or of a piece of them."""

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    g: Tensor | None
    erase: Tensor | None = None


def _backward(ctx: Any, d_o: Tensor | None, d_final: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of the inputs of `_ChunkedDelta.forward`, pieces and their chunks from last to first."""
    q, k, v, beta, g, erase, documents_BT, o, final, *saved = ctx.saved_tensors
    inputs = (q, k, v, beta, g, erase, documents_BT)
    if d_o is None:
        d_o = torch.zeros_like(o)
    size = len(_Walked._fields)
    walked = [_Walked(*saved[i : i + size]) for i in range(0, len(saved), size)]
    d_g, d_erase = (None if x is None else torch.empty_like(x) for x in (g, erase))
    own = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), torch.empty_like(beta)
    total = _Gradients(*own, d_g, d_erase)
    d_initial = torch.empty_like(final)
    for pieces in reversed(_cut_pieces(v, ctx.chunk_tokens, ctx.matrices)):
        rows = pieces[0].rows
        d_state = torch.zeros_like(final[rows]) if d_final is None else d_final[rows]
        after = final[rows]
        for piece in reversed(pieces):
            kept = walked.pop()
            terms = piece.terms(inputs, ctx.chunk_tokens, kept.scores)
            place = piece.rows, piece.tokens
            if isinstance(terms, VectorTerms):
                gradients, d_state = _differentiate_vector(terms, kept, d_o[place], d_state)
            else:
                gradients, d_state = _differentiate(terms, kept, o[place], d_o[place], after, d_state, g is not None)
            d_state = piece.resume(d_state, documents_BT)
            after = kept.entering[0]
            for whole, part in zip(total, gradients):
                if whole is not None and part is not None:
                    whole[place] = part
        d_initial[rows] = d_state
    d_start = None if ctx.initial_dtype is None else d_initial.to(ctx.initial_dtype)
    return (*total[:5], d_start, None, None, total.erase)


def _differentiate(
    terms: Terms, walked: _Walked, o: Tensor, d_o: Tensor, after: Tensor, d_state: Tensor, gated: bool
) -> tuple[_Gradients, Tensor]:
    """Gradients of a piece's inputs and of the state before it, from those of its o and of the state after it."""
    Q, N = terms.sizes.Q, terms.N
    d_o_heads = terms.heads_first(d_o)
    d_changes, d_v, leaving, d_state = _walk_back(terms, walked, d_o_heads, d_state)
    errors, entering = walked.errors, walked.entering
    changes = errors * terms.beta
    d_scores = terms.weigh_gradient(torch.matmul(d_o_heads, changes.mT))
    d_q = terms.from_start_gradient(torch.matmul(d_o_heads, entering.mT))
    _add_product(d_q, d_scores, terms.k)
    d_k = terms.to_end_gradient(torch.matmul(changes, leaving.mT))
    # Keys both write to the state that leaves and read from the one that enters, and meet each other inside the
    # chunk.
    d_k -= terms.from_start_gradient(torch.matmul(d_v, entering.mT))
    _add_product(d_k, d_scores.mT, terms.q)
    d_pairs = terms.weigh_gradient(torch.matmul(d_v, changes.mT)).tril_(-1)
    _add_product(d_k, d_pairs + d_pairs.mT, terms.k, -1.0)
    d_g = None
    if gated:
        d_b = terms.heads_first((o * d_o).sum(-1)) - (d_v * terms.v).sum(-1).unflatten(-1, (Q, N)).sum(-1)
        # b_end scales all that leaves the chunk; the state that leaves a chunk is the one that enters the next.
        d_b[:-1, ..., -1] += (entering[1:] * leaving[:-1]).sum((-1, -2))
        d_b[-1, ..., -1] += (after * leaving[-1]).sum((-1, -2))
        d_g = terms.gate_gradient(d_b)
    # beta also scales the columns of the triangular system (README.md, "Gradients").
    _add_product(d_changes, terms.interactions().tril_(-1).mT, d_v, -1.0)
    d_beta = d_changes.mul_(errors).sum(-1)
    d_q, d_k, d_v, d_beta = terms.tokens_first(d_q), *(terms.tokens_first(x, N) for x in (d_k, d_v, d_beta))
    return _Gradients(d_q, d_k, d_v, d_beta, d_g), d_state


def _differentiate_vector(
    terms: VectorTerms, walked: _Walked, d_o: Tensor, d_state: Tensor
) -> tuple[_Gradients, Tensor]:
    """`_differentiate` for gates of key channels, whose gradients come from the sums that each product's factors are."""
    d_o_heads = terms.heads_first(d_o)
    d_changes, d_v, leaving, d_state = _walk_back(terms, walked, d_o_heads, d_state)
    errors, entering = walked.errors, walked.entering
    changes = errors * terms.beta
    d_q = torch.matmul(d_o_heads, entering.mT).mul_(terms.start)
    d_found = torch.matmul(d_v, entering.mT).mul_(terms.start).neg_()
    d_written = torch.matmul(changes, leaving.mT).mul_(terms.end)
    d_starts = (d_q * terms.q).addcmul_(d_found, terms.asked)
    d_starts[..., -1, :] += (entering * leaving).sum(-1).mul_(terms.start[..., -1, :])
    d_ends = d_written * terms.k
    d_scores = torch.stack([torch.matmul(d_o_heads, changes.mT), torch.matmul(d_v, changes.mT).neg_()], dim=3)
    # Where keys ask, one sum is that of both.
    d_k, d_asked = (d_found.add_(d_written),) * 2 if terms.erase is None else (d_written, d_found)
    sums = ScoreSums(*(x.flatten(0, 2) for x in (d_q, d_k, d_asked, d_starts, d_ends)))
    terms.score_gradients(d_scores.flatten(0, 2), sums)
    _add_product(d_changes, terms.interactions().mT, d_v, -1.0)
    d_beta = d_changes.mul_(errors).sum(-1)
    lead = d_q.shape[:3]
    d_q, d_g, d_erase = (terms.tokens_first(x.unflatten(0, lead)) for x in (sums.q, sums.starts, sums.asked))
    d_k, d_v, d_beta = (terms.tokens_first(x, 1) for x in (sums.k.unflatten(0, lead), d_v, d_beta))
    return _Gradients(d_q, d_k, d_v, d_beta, d_g, None if terms.erase is None else d_erase), d_state
