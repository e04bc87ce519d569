"""Decayed linear attention with a decay of each key channel, in chunks with PyTorch.

The derivation, with the names used here, is in README.md next to this file.

How: with a decay of each channel the decay no longer leaves q k^T as a factor. Splitting it at the chunk's
start needs e^(-b), which overflows; so the chunk is halved down to single tokens, and each level of halves is
one product of queries decayed from the middle and keys decayed to it (`amfm.kernels.common.chunks`). Tiles of some
heads and chunks are walked so that the levels of one stay in cache. Documents are cut by gates of -inf and need
no masks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from amfm.kernels.common.chunks import (
    blocks_below,
    compose_scores,
    cut_gates,
    dot_rows,
    halves,
    pad_tokens,
    spread_rows,
    walk_levels,
)
from amfm.kernels.common.gemm_precision import gemm_dtype

# Numbers of q in a tile for each thread, 1 MiB of float32: smaller tiles spend their time in calls, larger ones in memory.
_TILE = 262144


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
    Products with v and with states take operands of `product_dtype`, by default what this machine multiplies fast.
    Under torch.compile the plain composition runs, which Inductor fuses; otherwise a hand-written backward.

    Raises ValueError unless the chunk size is a power of two.

    q, k and g [B, T, H, K], v [B, T, H, V], initial state [B, H, K, V]; g <= 0 in float32 (float64 for
    float64).
    """
    if chunk_size & (chunk_size - 1):
        raise ValueError(f"chunk_size={chunk_size} must be a power of two for a vector gate; use 16, 32, 64 or 128")
    T = v_BTHV.shape[1]
    chunk_size = min(chunk_size, 1 << (T - 1).bit_length())
    products = gemm_dtype(v_BTHV) if product_dtype is None else product_dtype
    g_BTHK = cut_gates(g_BTHK, document_ids_BT)
    arguments = (q_BTHK, k_BTHK, v_BTHV, g_BTHK, initial_state_BHKV, chunk_size, products)
    if torch.compiler.is_compiling():
        return compose_vector_scan(*arguments)
    return _ChunkedVectorScan.apply(*arguments)


def compose_vector_scan(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    g_BTHK: Tensor,
    initial_state_BHKV: Tensor | None,
    chunk_size: int,
    gemm: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The same as `chunked_vector_scan`, of gates that `cut_gates` returned, as a plain composition of differentiable operations, for the compiler."""
    (B, T, H, V), K, Q = v_BTHV.shape, q_BTHK.shape[3], chunk_size
    chunks = (T + Q - 1) // Q
    wide = g_BTHK.dtype
    # Padding has gates of 0 and keys of zeros: the state passes it unchanged.
    padded = (pad_tokens(x, chunks * Q - T) for x in (q_BTHK.to(wide), k_BTHK.to(wide), v_BTHV, g_BTHK))
    q, k, v, g = (x.view(B, chunks, Q, H, -1).transpose(2, 3) for x in padded)
    (scores,), from_start, to_end = compose_scores((q,), k, g)
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


@dataclass(frozen=True)
class _Row:
    """How rows are cut: B rows, T tokens, H heads, state K x V, chunks of Q tokens."""

    B: int
    T: int
    H: int
    K: int
    V: int
    Q: int
    chunks: int

    @classmethod
    def of(cls, q_BTHK: Tensor, v_BTHV: Tensor, Q: int) -> _Row:
        """Sizes of a call."""
        (B, T, H, V), K = v_BTHV.shape, q_BTHK.shape[3]
        return cls(B, T, H, K, V, Q, (T + Q - 1) // Q)

    def cut(self, x_BTHX: Tensor) -> Tensor:
        """[B, T, H, X] as [B, chunks, H, Q, X], tokens of zeros at the end."""
        x = pad_tokens(x_BTHX, self.chunks * self.Q - self.T)
        return x.unflatten(1, (self.chunks, self.Q)).transpose(2, 3)

    def empty(self, size: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Room for a result [B, T, H, size], and a view of it as `cut` gives it."""
        room = like.new_empty(self.B, self.chunks * self.Q, self.H, size)
        return room[:, : self.T], room.unflatten(1, (self.chunks, self.Q)).transpose(2, 3)

    def tiles(self) -> Iterator[tuple[tuple[slice, slice], list[tuple[slice, slice, slice]]]]:
        """Rows and heads whose states are walked together, each with its parts of some chunks, first to last.

        A tile takes heads first, then chunks, then rows, up to `_TILE` numbers of q for each thread. Chunks of
        one row must come in order, because the state passes from one to the next.
        """
        room = max(1, _TILE * torch.get_num_threads() // (self.Q * self.K))
        heads = min(self.H, room)
        chunks = min(self.chunks, max(1, room // heads))
        rows = max(1, room // (heads * chunks))
        for row in range(0, self.B, rows):
            for head in range(0, self.H, heads):
                of, at = slice(row, row + rows), slice(head, head + heads)
                yield (of, at), [(of, slice(c, c + chunks), at) for c in range(0, self.chunks, chunks)]


class _Tile:
    """Inputs of some rows, chunks and heads as [N, Q, X], N the product of the three, in the dtype of the gates."""

    def __init__(self, inputs: tuple[Tensor, ...], where: tuple[slice, ...], gemm: torch.dtype) -> None:
        """Copy a tile of q, k, v and g, each as `_Row.cut` gives it."""
        q, k, v, g = (x[where] for x in inputs)
        self.lead = tuple(g.shape[:3])
        self.q, self.k, self.g = (x.to(g.dtype).flatten(0, 2).contiguous() for x in (q, k, g))
        self.v = v.to(gemm).flatten(0, 2)
        self.gemm, self.wide = gemm, g.dtype

    def scores(self, levels: Iterator[tuple[int, Tensor]]) -> tuple[Tensor, Tensor]:
        """q_i . k_j with their decay, zero above the diagonal, [N, Q, Q]; and the factors of the whole chunk."""
        N, Q, _ = self.q.shape
        scores = self.q.new_zeros(N, Q, Q)
        scores.diagonal(dim1=1, dim2=2).copy_((self.q * self.k).sum(-1))
        for size, factors in levels:
            if size == Q:
                return scores, factors
            keys = halves(self.k, size)[0] * factors[:, :, 0]
            queries = halves(self.q, size)[1] * factors[:, :, 1]
            blocks_below(scores, size).copy_(dot_rows(queries, keys).permute(0, 2, 3, 1))
        raise AssertionError("the last level is the whole chunk")

    def multiply(self, left: Tensor, right: Tensor) -> Tensor:
        """A product of batches of matrices with operands of the product dtype.

        Sums are the library's float32 for bfloat16 operands, widened again afterwards.
        """
        return torch.bmm(left.to(self.gemm), right.to(self.gemm)).to(self.wide)

    def whole(self, x_NXX: Tensor) -> Tensor:
        """[N, X, X] as [rows, chunks, heads, X, X]."""
        return x_NXX.view(*self.lead, *x_NXX.shape[1:])


class _ChunkedVectorScan(torch.autograd.Function):
    """`chunked_vector_scan` with its gradient written out: saves the inputs, scores, and the states entering chunks."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        initial: Tensor | None,
        chunk_size: int,
        gemm: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        row = _Row.of(q, v, chunk_size)
        inputs = (row.cut(q), row.cut(k), row.cut(v), row.cut(g))
        o, o_cut = row.empty(row.V, v)
        entering = g.new_empty(row.B, row.chunks, row.H, row.K, row.V)
        saved = g.new_empty(row.B, row.chunks, row.H, row.Q, row.Q, dtype=gemm)
        final = g.new_zeros(row.B, row.H, row.K, row.V) if initial is None else initial.to(g.dtype, copy=True)
        for walked, parts in row.tiles():
            state = final[walked]
            for where in parts:
                tile = _Tile(inputs, where, gemm)
                scores, factors = tile.scores(walk_levels(tile.g))
                local = tile.whole(tile.multiply((tile.k * factors[:, 0]).transpose(1, 2), tile.v))
                carry = tile.whole(factors[:, 1, -1, :, None])
                for c in range(local.shape[1]):
                    entering[where][:, c] = state
                    state = torch.addcmul(local[:, c], carry[:, c], state)
                read = tile.multiply(tile.q * factors[:, 1], entering[where].flatten(0, 2))
                o_cut[where] = tile.whole(read + tile.multiply(scores, tile.v)).to(v.dtype)
                # In the dtype of products, in which backward reads them.
                saved[where] = tile.whole(scores).to(gemm)
            final[walked] = state
        ctx.save_for_backward(q, k, v, g, saved, entering)
        ctx.chunk_size, ctx.gemm = chunk_size, gemm
        ctx.initial_dtype = None if initial is None else initial.dtype
        ctx.set_materialize_grads(False)
        return o.contiguous(), final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_o: Tensor | None, d_final: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, g, scores, entering = ctx.saved_tensors
        row = _Row.of(q, v, ctx.chunk_size)
        inputs = (row.cut(q), row.cut(k), row.cut(v), row.cut(g))
        d_o_cut = row.cut(torch.zeros_like(v) if d_o is None else d_o)
        gradients, cuts = zip(*(row.empty(x.shape[3], x) for x in (q, k, v, g)))
        d_initial = torch.zeros_like(entering[:, 0]) if d_final is None else d_final.clone()
        for walked, parts in row.tiles():
            d_state = d_initial[walked]
            for where in reversed(parts):
                tile = _Tile(inputs, where, ctx.gemm)
                d_out = d_o_cut[where].to(ctx.gemm).flatten(0, 2)
                d_state, of_tile = _differentiate(tile, d_out, scores[where], entering[where], d_state)
                for cut, gradient in zip(cuts, of_tile):
                    cut[where] = tile.whole(gradient).to(cut.dtype)
            d_initial[walked] = d_state
        first = None if ctx.initial_dtype is None else d_initial.to(ctx.initial_dtype)
        return (*gradients, first, None, None)


def _differentiate(
    tile: _Tile, d_out: Tensor, scores: Tensor, entering: Tensor, d_state: Tensor
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Gradients of the state that enters a tile, and of its q, k, v and g [N, Q, X].

    Within a tile chunks are walked backward for the gradients of states, then all are differentiated at once.
    d_starts and d_ends collect factor times gradient of every power e^starts and e^ends; handed down the
    levels, d_starts ends as the gradient of the gates.
    """
    *levels, (_, factors) = walk_levels(tile.g)
    to_end, from_start = factors[:, 0], factors[:, 1]
    carry = tile.whole(from_start[:, -1, :, None])
    d_local = tile.whole(tile.multiply((tile.q * from_start).transpose(1, 2), d_out))
    leaving = torch.empty_like(d_local)
    for c in reversed(range(d_local.shape[1])):
        leaving[:, c] = d_state
        d_state = torch.addcmul(d_local[:, c], carry[:, c], d_state)
    # The chunk's whole decay scales the entering state: factor times gradient, for its exponent.
    d_carry = (entering * leaving).sum(-1).mul_(carry[..., 0]).flatten(0, 2)
    entering, leaving = entering.flatten(0, 2), leaving.flatten(0, 2)
    d_v = tile.multiply(tile.k * to_end, leaving)
    d_v += tile.multiply(scores.flatten(0, 2).transpose(1, 2), d_out)
    d_q = tile.multiply(d_out, entering.transpose(1, 2)).mul_(from_start)
    d_k = tile.multiply(tile.v, leaving.transpose(1, 2)).mul_(to_end)
    d_starts, d_ends = d_q * tile.q, d_k * tile.k
    d_starts[:, -1] += d_carry
    d_scores = tile.multiply(d_out, tile.v.transpose(1, 2))
    for size, factors in reversed(levels):
        _differentiate_level(tile, size, factors, d_scores, (d_q, d_k, d_starts, d_ends))
    # A token's product with its own key has no decay, and so no gradient of a gate.
    on_diagonal = d_scores.diagonal(dim1=1, dim2=2)[..., None]
    d_q.addcmul_(on_diagonal, tile.k)
    d_k.addcmul_(on_diagonal, tile.q)
    return d_state, (d_q, d_k, d_v, d_starts)


def _differentiate_level(
    tile: _Tile, size: int, factors: Tensor, d_scores: Tensor, sums: tuple[Tensor, Tensor, Tensor, Tensor]
) -> None:
    """Add what the pairs of one level give to the gradients of q, k and of the sums of gates from starts and to ends.

    Those sums came from the ones of this level's halves, so their gradients are handed down first.
    """
    d_q, d_k, d_starts, d_ends = sums
    (d_first, d_second), d_to_end = halves(d_starts, size), halves(d_ends, size)[0]
    d_first[:, :, -1] += d_second.sum(2)
    d_second[:, :, -1] += d_to_end.sum(2)
    keys, queries = halves(tile.k, size)[0], halves(tile.q, size)[1]
    d_block = blocks_below(d_scores, size).permute(0, 3, 1, 2).contiguous()
    of_queries = spread_rows(d_block, keys * factors[:, :, 0]).mul_(factors[:, :, 1])
    of_keys = spread_rows(d_block.transpose(-1, -2), queries * factors[:, :, 1]).mul_(factors[:, :, 0])
    halves(d_q, size)[1].add_(of_queries)
    halves(d_k, size)[0].add_(of_keys)
    d_second.addcmul_(of_queries, queries)
    d_to_end.addcmul_(of_keys, keys)
