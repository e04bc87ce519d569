"""The gated delta product in chunks with PyTorch: matrix products over all chunks, and a loop over chunks for the state.

The derivation, with the names used here, is in README.md next to this file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.chunks import Chunks, Documents, cut_documents, pad_tokens
from kernels.delta_scan.inverse import invert_unit_lower
from kernels.gemm_precision import gemm_dtype


def chunked_delta(
    q_BTGK: Tensor,
    k_BTNGK: Tensor,
    v_BTNHV: Tensor,
    beta_BTNH: Tensor,
    g_BTH: Tensor | None,
    initial_state_BHKV: Tensor | None,
    document_ids_BT: Tensor | None,
    chunk_size: int,
    product_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """`delta_by_steps` in chunks of `chunk_size` tokens; beta, g and the state are float32 (float64 for float64 inputs).

    Returns o [B, T, H, V] in the dtype of v and the last state [B, H, K, V]. Matrix products take operands of
    `product_dtype`, by default what this machine multiplies fast; those that make and apply the inverse are float32.
    Under torch.compile the plain composition runs, which Inductor fuses; otherwise a hand-written backward.
    """
    chunk_size = min(chunk_size, v_BTNHV.shape[1])
    products = gemm_dtype(v_BTNHV) if product_dtype is None else product_dtype
    rows = (q_BTGK, k_BTNGK, v_BTNHV, beta_BTNH, g_BTH)
    arguments = (*rows, initial_state_BHKV, document_ids_BT, chunk_size, products)
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
    chunk_size: int,
    gemm: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The same as `chunked_delta` as a plain composition of differentiable operations, for the compiler."""
    setup = _set_up(q_BTGK, k_BTNGK, v_BTNHV, beta_BTNH, g_BTH, document_ids_BT, chunk_size, gemm)
    s, wide = setup.sizes, setup.wide
    shape = (s.B * s.H, s.chunks)
    strict = setup.interactions() * setup.beta.unsqueeze(-2)
    identity = torch.eye(setup.M, dtype=wide, device=strict.device)
    inverse = torch.linalg.solve_triangular(strict + identity, identity.expand_as(strict), upper=False)
    inverse = inverse.view(*shape, setup.M, setup.M)
    into = setup.keys_from_start().reshape(*shape, setup.M, s.K)
    out_of = setup.keys_to_end().reshape(*shape, setup.M, s.K).transpose(-1, -2)
    v, beta, carry = setup.v.reshape(*shape, setup.M, s.V), setup.beta.reshape(*shape, setup.M, 1), setup.carry()
    if initial_state_BHKV is None:
        state = v.new_zeros(s.B * s.H, s.K, s.V)
    else:
        state = initial_state_BHKV.to(wide).reshape(s.B * s.H, s.K, s.V)
    entering, changes = [], []
    for c in range(s.chunks):
        entering.append(state)
        error = v[:, c] - setup.product(into[:, c], state)
        changes.append(beta[:, c] * (inverse[:, c] @ error))
        state = carry[:, c] * state + setup.product(out_of[:, c], changes[-1])
    entered = torch.stack(entering, dim=1).view(s.B, s.H, s.chunks, s.K, s.V)
    changed = torch.stack(changes, dim=1).view(s.B, s.H, s.chunks, setup.M, s.V)
    o = setup.product(setup.queries_from_start(), entered) + setup.product(setup.mix(), changed)
    return setup.tokens(o)[:, : s.T].to(v_BTNHV.dtype), state.view(s.B, s.H, s.K, s.V)


@dataclass
class _Setup:
    """What forward and backward both derive from the inputs, heads first: [B, G or H, chunks, steps or tokens, ...].

    A chunk has M = Q N steps, those of a token next to each other. J gates a token: H, or 1 (all zero) without decay.
    """

    sizes: Chunks
    N: int
    documents: Documents
    q: Tensor  # [B, G, chunks, Q, K]
    k: Tensor  # [B, G, chunks, M, K]
    v: Tensor  # [B, H, chunks, M, V]
    beta: Tensor  # [B, H, chunks, M]
    b_nJQ: Tensor
    decay: Tensor  # exp(b_i - b_j) for tokens j <= i of one document, 0 elsewhere, [B, J, chunks, Q, Q]
    gemm: torch.dtype
    wide: torch.dtype

    @property
    def M(self) -> int:
        """Steps of a chunk."""
        return self.sizes.Q * self.N

    def heads_first(self, x_nJ: Tensor) -> Tensor:
        """[B chunks, J, ...] as [B, J, chunks, ...]."""
        return x_nJ.view(self.sizes.B, self.sizes.chunks, *x_nJ.shape[1:]).transpose(1, 2)

    def grouped(self, x_BJ: Tensor) -> Tensor:
        """[B, J, ...] as [B, G, R, ...], or [B, 1, 1, ...] where J is 1 for all heads."""
        B, J = x_BJ.shape[:2]
        shape = (self.sizes.G, self.sizes.R) if J == self.sizes.H else (1, 1)
        return x_BJ.reshape(B, *shape, *x_BJ.shape[2:])

    def by_head(self, x_BGR: Tensor) -> Tensor:
        """[B, G, R, ...] as [B, H, ...]."""
        return x_BGR.reshape(x_BGR.shape[0], self.sizes.H, *x_BGR.shape[3:])

    def spread(self, x_BG: Tensor, weights_BJ: Tensor) -> Tensor:
        """Vectors of a group times one weight each of every head, [B, H, chunks, rows, K]."""
        weights = self.grouped(weights_BJ.expand(-1, self.sizes.H, -1, -1))
        return self.by_head(x_BG.unsqueeze(2) * weights[..., None])

    def sum_heads(self, x_BH: Tensor) -> Tensor:
        """The transpose of giving a group's tensor to its heads: [B, H, ...] as [B, G, ...]."""
        return x_BH if self.sizes.R == 1 else self.grouped(x_BH).sum(2)

    def steps(self, x_BJcQ: Tensor) -> Tensor:
        """Numbers of tokens as numbers of their steps, [B, J, chunks, M]."""
        return x_BJcQ if self.N == 1 else x_BJcQ.repeat_interleave(self.N, dim=-1)

    def from_start(self) -> Tensor:
        """exp(b_i) for tokens of the document that owns the entering state, [B, J, chunks, Q]."""
        return self.heads_first(self.documents.keep_first(self.b_nJQ.exp()))

    def to_end(self) -> Tensor:
        """exp(b_end - b_j) for tokens of the chunk's last document, [B, J, chunks, Q]."""
        return self.heads_first(self.documents.keep_last(self.b_nJQ[..., -1:] - self.b_nJQ).exp())

    def carry(self) -> Tensor:
        """Factor of the entering state in the leaving one, [B H, chunks, 1, 1]."""
        s = self.sizes
        carry = self.heads_first(self.documents.keep_carry(self.b_nJQ[..., -1].exp()))
        return carry.expand(s.B, s.H, s.chunks).reshape(s.B * s.H, s.chunks, 1, 1)

    def weigh(self, scores: Tensor) -> Tensor:
        """Scores [B, G, 1 or R, chunks, rows, M] times the decay between their tokens; rows are tokens or steps."""
        s = self.sizes
        rows = scores.shape[-2]
        cut = scores.view(s.B, s.G, -1, s.chunks, s.Q, rows // s.Q, s.Q, self.N)
        weighed = cut * self.grouped(self.decay)[..., :, None, :, None]
        return weighed.view(s.B, s.G, -1, s.chunks, rows, self.M)

    def interactions(self) -> Tensor:
        """(k_i . k_j) exp(b_i - b_j) for steps j < i of one document, 0 elsewhere, [B, H, chunks, M, M]."""
        k = self.k.to(self.wide)
        scores = torch.matmul(k, k.transpose(-1, -2)).unsqueeze(2)
        return self.by_head(self.weigh(scores).expand(-1, -1, self.sizes.R, -1, -1, -1)).tril(-1)

    def mix(self) -> Tensor:
        """(q_i . k_j) exp(b_i - b_j) for steps j of tokens up to i of one document, [B, H, chunks, Q, M]."""
        scores = self.product(self.q, self.k.transpose(-1, -2)).unsqueeze(2)
        return self.by_head(self.weigh(scores).expand(-1, -1, self.sizes.R, -1, -1, -1))

    def keys_from_start(self) -> Tensor:
        """Keys times `from_start`, [B, H, chunks, M, K]."""
        return self.spread(self.k, self.steps(self.from_start()))

    def keys_to_end(self) -> Tensor:
        """Keys times `to_end`, [B, H, chunks, M, K]."""
        return self.spread(self.k, self.steps(self.to_end()))

    def queries_from_start(self) -> Tensor:
        """Queries times `from_start`, [B, H, chunks, Q, K]."""
        return self.spread(self.q, self.from_start())

    def product(self, left: Tensor, right: Tensor) -> Tensor:
        """left @ right with operands in the dtype of products, wide."""
        return torch.matmul(left.to(self.gemm), right.to(self.gemm)).to(self.wide)

    def tokens(self, x_BHcQ: Tensor) -> Tensor:
        """[B, H, chunks, Q, V] as rows of tokens [B, chunks Q, H, V]."""
        return x_BHcQ.permute(0, 2, 3, 1, 4).flatten(1, 2)


def _set_up(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    documents_BT: Tensor | None,
    chunk_size: int,
    gemm: torch.dtype,
) -> _Setup:
    B, T, N, H, V = v.shape
    G, K = q.shape[2:]
    s = Chunks.of(B, T, H, G, K, V, chunk_size)
    wide = beta.dtype
    q, k, v, beta = (pad_tokens(x, s.padding) for x in (q, k, v, beta))
    g = beta.new_zeros(B, s.chunks * s.Q, 1) if g is None else pad_tokens(g, s.padding)
    g_nJQ = g.reshape(s.count, s.Q, -1).transpose(1, 2).contiguous()
    documents = cut_documents(documents_BT, s, g_nJQ)
    cut, M = (B, s.chunks, s.Q), s.Q * N
    b_nJQ = documents.sum_inside(g_nJQ)

    def heads_first(x_nJ: Tensor) -> Tensor:
        return x_nJ.view(B, s.chunks, *x_nJ.shape[1:]).transpose(1, 2)

    b = heads_first(b_nJQ)
    bias = documents.bias if documents.bias.dim() == 2 else heads_first(documents.bias)
    return _Setup(
        s,
        N,
        documents,
        q.to(wide).view(*cut, G, K).permute(0, 3, 1, 2, 4).contiguous(),
        k.to(wide).view(*cut, N, G, K).permute(0, 4, 1, 2, 3, 5).reshape(B, G, s.chunks, M, K),
        v.to(wide).view(*cut, N, H, V).permute(0, 4, 1, 2, 3, 5).reshape(B, H, s.chunks, M, V),
        beta.view(*cut, N, H).permute(0, 4, 1, 2, 3).reshape(B, H, s.chunks, M),
        b_nJQ,
        (b[..., :, None] - b[..., None, :] + bias).clamp(max=0.0).exp(),
        gemm,
        wide,
    )


class _ChunkedDelta(torch.autograd.Function):
    """`chunked_delta` with its gradient written out: saves the inputs, o, the inverses, errors and entering states."""

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
        chunk_size: int,
        gemm: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        setup = _set_up(q, k, v, beta, g, documents_BT, chunk_size, gemm)
        s = setup.sizes
        strict = setup.interactions() * setup.beta.unsqueeze(-2)
        inverse = invert_unit_lower(strict.view(-1, setup.M, setup.M)).view(s.B * s.H, s.chunks, setup.M, setup.M)
        entering, errors, final = _walk(setup, inverse, initial)
        changes = errors.view(setup.v.shape) * setup.beta.unsqueeze(-1)
        o = setup.product(setup.queries_from_start(), entering.view(s.B, s.H, s.chunks, s.K, s.V))
        o += setup.product(setup.mix(), changes)
        ctx.save_for_backward(q, k, v, beta, g, documents_BT, o, inverse, entering, errors, final)
        ctx.chunk_size, ctx.gemm = chunk_size, gemm
        ctx.initial_dtype = None if initial is None else initial.dtype
        ctx.set_materialize_grads(False)
        return setup.tokens(o)[:, : s.T].to(v.dtype), final.view(s.B, s.H, s.K, s.V).clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_o: Tensor | None, d_final: Tensor | None) -> tuple[Tensor | None, ...]:
        return _backward(ctx, d_o, d_final)


def _walk(setup: _Setup, inverse: Tensor, initial: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """States entering each chunk [B H, chunks, K, V], errors [B H, chunks, M, V] and the last state [B H, K, V]."""
    s, M = setup.sizes, setup.M
    shape = (s.B * s.H, s.chunks)
    into = setup.keys_from_start().reshape(*shape, M, s.K)
    out_of = setup.keys_to_end().reshape(*shape, M, s.K).transpose(-1, -2)
    v, beta, carry = setup.v.reshape(*shape, M, s.V), setup.beta.reshape(*shape, M, 1), setup.carry()
    entering = v.new_empty(*shape, s.K, s.V)
    errors = torch.empty_like(v)
    state = v.new_zeros(s.B * s.H, s.K, s.V) if initial is None else initial.to(v.dtype).reshape(-1, s.K, s.V)
    for c in range(s.chunks):
        entering[:, c] = state
        torch.bmm(inverse[:, c], v[:, c] - setup.product(into[:, c], state), out=errors[:, c])
        state = (carry[:, c] * state).add_(setup.product(out_of[:, c], beta[:, c] * errors[:, c]))
    return entering, errors, state


def _walk_back(
    setup: _Setup, inverse: Tensor, d_o: Tensor, d_final: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of changes [B, H, chunks, M, V], of v, of the states leaving chunks [B H, chunks, K, V], of the initial."""
    s, M = setup.sizes, setup.M
    shape = (s.B * s.H, s.chunks)
    into = setup.keys_from_start().reshape(*shape, M, s.K).transpose(-1, -2)
    out_of = setup.keys_to_end().reshape(*shape, M, s.K)
    beta, carry = setup.beta.reshape(*shape, M, 1), setup.carry()
    d_changes = setup.product(setup.mix().transpose(-1, -2), d_o).view(*shape, M, s.V)
    d_read = setup.product(setup.queries_from_start().transpose(-1, -2), d_o).view(*shape, s.K, s.V)
    d_v = torch.empty_like(d_changes)
    leaving = torch.empty_like(d_read)
    d_state = torch.zeros_like(d_read[:, 0]) if d_final is None else d_final.reshape(-1, s.K, s.V)
    for c in range(s.chunks - 1, -1, -1):
        leaving[:, c] = d_state
        d_changes[:, c] += setup.product(out_of[:, c], d_state)
        torch.bmm(inverse[:, c].transpose(1, 2), beta[:, c] * d_changes[:, c], out=d_v[:, c])
        d_state = torch.addcmul(d_read[:, c], carry[:, c], d_state).sub_(setup.product(into[:, c], d_v[:, c]))
    return d_changes.view(setup.v.shape), d_v.view(setup.v.shape), leaving, d_state


def _backward(ctx: Any, d_o: Tensor | None, d_final: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, beta, g, documents_BT, o, inverse, entering, errors, final = ctx.saved_tensors
    setup = _set_up(q, k, v, beta, g, documents_BT, ctx.chunk_size, ctx.gemm)
    s = setup.sizes
    if d_o is None:
        d_o = v.new_zeros(s.B, s.T, s.H, s.V)
    d_o = (
        pad_tokens(d_o, s.padding).to(setup.wide).view(s.B, s.chunks, s.Q, s.H, s.V).permute(0, 3, 1, 2, 4).contiguous()
    )
    d_changes, d_v, leaving, d_initial = _walk_back(setup, inverse, d_o, d_final)
    states = (s.B, s.H, s.chunks, s.K, s.V)
    entered, left = entering.view(states), leaving.view(states)
    errors = errors.view(setup.v.shape)
    changes = errors * setup.beta.unsqueeze(-1)

    d_scores = setup.sum_heads(setup.by_head(setup.weigh(setup.grouped(setup.product(d_o, changes.mT)))))
    d_q = setup.sum_heads(setup.product(d_o, entered.mT) * setup.from_start()[..., None])
    d_q += setup.product(d_scores, setup.k)

    d_k = setup.product(changes, left.mT) * setup.steps(setup.to_end())[..., None]
    d_k -= setup.product(d_v, entered.mT) * setup.steps(setup.from_start())[..., None]
    d_k = setup.sum_heads(d_k) + setup.product(d_scores.mT, setup.q)
    d_pairs = setup.sum_heads(setup.by_head(setup.weigh(setup.grouped(setup.product(d_v, changes.mT))))).tril(-1)
    d_k -= setup.product(d_pairs + d_pairs.mT, setup.k)

    d_beta = (errors * (d_changes - setup.interactions().mT @ d_v)).sum(-1)
    d_g = None
    if g is not None:
        d_b = (d_o * o).sum(-1) - (d_v * setup.v).sum(-1).unflatten(-1, (s.Q, setup.N)).sum(-1)
        after = torch.cat([entering[:, 1:], final[:, None]], dim=1).view(states)
        d_b[..., -1] += (after * left).sum((-1, -2))
        d_b_nHQ = d_b.transpose(1, 2).reshape(s.count, s.H, s.Q)
        d_g = setup.documents.sum_inside_reversed(d_b_nHQ).transpose(1, 2).reshape(s.B, -1, s.H)[:, : s.T]

    def trim(gradient: Tensor, like: Tensor) -> Tensor:
        """[B, heads, chunks, Q or M, ...] as the input it belongs to."""
        rows = gradient.movedim(1, 3).reshape(s.B, s.chunks * s.Q, *like.shape[2:])
        return rows[:, : s.T].to(like.dtype)

    return (
        trim(d_q, q),
        trim(d_k, k),
        trim(d_v, v),
        trim(d_beta, beta),
        d_g,
        None if ctx.initial_dtype is None else d_initial.view(s.B, s.H, s.K, s.V).to(ctx.initial_dtype),
        None,
        None,
        None,
    )
