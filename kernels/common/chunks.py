"""How a row is cut into chunks, what a document boundary changes inside one, decays as powers of 2, and gates of each channel.

Every scan in PyTorch cuts rows the same way, so the cut, the masks of documents and the two layouts (tokens
first as the model has them, heads first as batched products want them) live here. Letters as in
docs/notation.md, with n for the chunks of all rows and Q for the tokens of a chunk.

On a CPU PyTorch's `exp` is the vendor library's, which takes 1 ns a number, twice that for minus infinity and
forty times where the result is subnormal, as decays over many tokens are. Its `exp2` takes half a nanosecond
whatever the exponent. So sums of gates are scaled by log2(e) once and every decay is an `exp2`.

Gates of each key channel are sums over halves of halves, which the decay and the delta scans share. A pair of tokens parts at
the middle of the smallest aligned block of 2^n tokens that holds both: the later one's query and the earlier one's key are
decayed to there. Both exponents are sums of gates and at most 0, so nothing overflows however strong the gates are, and a gate
of -inf cuts a document off exactly (kernels/decay_scan/README.md)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

LOG2_E = math.log2(math.e)


@dataclass(frozen=True)
class Chunks:
    """Sizes of a scan in chunks of Q tokens: B rows, T tokens, H heads in G groups of R, state K x V.

    The `count` (n) chunks of all rows are in the order [chunks, B]: those that follow another one in their row, and those
    that another one follows, are one piece each.

    Chunk c of row b is number c * B + b.
    """

    B: int
    T: int
    H: int
    G: int
    R: int
    K: int
    V: int
    Q: int
    chunks: int
    count: int
    padding: int

    @classmethod
    def of(cls, B: int, T: int, H: int, G: int, K: int, V: int, Q: int) -> Chunks:
        """Cut T tokens into chunks of Q; the last one is filled up with `padding` tokens that do nothing."""
        chunks = (T + Q - 1) // Q
        return cls(B, T, H, G, H // G, K, V, Q, chunks, B * chunks, chunks * Q - T)


@dataclass(frozen=True)
class Documents:
    """Masks of the documents in each chunk; the masks are None if every row holds one document.

    bias: [Q, Q] or [n, 1, Q, Q], 0 where token j may reach token i and -inf elsewhere.
    inside: [n, Q, Q], 1 where j <= i and both are in one document.
    first: [n, 1, Q], 1 for tokens of the document that owns the state entering the chunk.
    last: [n, 1, Q], 0 for tokens of the chunk's last document and -inf for the others, like bias.
    carry: [n, 1], 1 where that is one document, so the entering state reaches the chunk's end.
    """

    bias: Tensor
    inside: Tensor | None
    first: Tensor | None
    last: Tensor | None
    carry: Tensor | None

    def sum_inside(self, g_nHQ: Tensor) -> Tensor:
        """Cumulative sum over a chunk that restarts at each document.

        With documents it is a product with a matrix of zeros and ones, so that the sum of one document does not hold
        the rounding of the documents before it.
        """
        if self.inside is None:
            return g_nHQ.cumsum(-1)
        return torch.bmm(g_nHQ, self.inside.transpose(1, 2))

    def sum_inside_reversed(self, gradient_nHQ: Tensor) -> Tensor:
        """The transpose of `sum_inside`: the sum over this token and those after it in its document."""
        if self.inside is None:
            return gradient_nHQ.flip(-1).cumsum(-1).flip(-1)
        return torch.bmm(gradient_nHQ, self.inside)

    def keep_first(self, weights_nHQ: Tensor) -> Tensor:
        """Zero the weights of tokens that the entering state must not reach."""
        return weights_nHQ if self.first is None else weights_nHQ * self.first

    def keep_last(self, exponents_nHQ: Tensor) -> Tensor:
        """Make the weights of tokens zero whose document ended before the chunk does: their exponents become -inf.

        Across documents an exponent is the difference of two sums that have nothing to do with each other. It may be so
        large that its power is infinite, and infinity times a zero of a mask is NaN.
        """
        return exponents_nHQ if self.last is None else exponents_nHQ + self.last

    def keep_carry(self, carry_nH: Tensor) -> Tensor:
        """Zero the decay of states that do not outlive the chunk."""
        return carry_nH if self.carry is None else carry_nH * self.carry


def cut_documents(document_ids_BT: Tensor | None, s: Chunks, like: Tensor) -> Documents:
    """Masks, on the device and in the dtype of `like`, for rows cut as `s` says; without document ids the cheap form."""
    dtype, device = like.dtype, like.device
    lower = torch.ones(s.Q, s.Q, dtype=torch.bool, device=device).tril()
    if document_ids_BT is None:
        bias = torch.zeros(s.Q, s.Q, dtype=dtype, device=device).masked_fill(~lower, -torch.inf)
        return Documents(bias, None, None, None, None)
    ids = document_ids_BT
    if s.padding:
        # Padding belongs to the last document, so that it ends nothing.
        ids = torch.cat([ids, ids[:, -1:].expand(-1, s.padding)], dim=1)
    ids = ids.reshape(s.B, s.chunks, s.Q).transpose(0, 1).contiguous()
    end = ids[..., -1]
    # The state that enters a chunk belongs to the last document of the chunk before; a given initial state to
    # the row's first.
    owner = torch.cat([ids[:1, :, 0], end[:-1]])
    same = ((ids[..., :, None] == ids[..., None, :]) & lower).view(s.count, s.Q, s.Q)
    bias = torch.zeros(same.shape, dtype=dtype, device=device).masked_fill(~same, -torch.inf)
    return Documents(
        bias.unsqueeze(1),
        same.to(dtype),
        (ids == owner[..., None]).to(dtype).view(s.count, 1, s.Q),
        torch.zeros(ids.shape, dtype=dtype, device=device)
        .masked_fill(ids != end[..., None], -torch.inf)
        .view(s.count, 1, s.Q),
        (end == owner).to(dtype).view(s.count, 1),
    )


def heads_first(x_BTH: Tensor, s: Chunks) -> Tensor:
    """Rows [B, T, heads, ...] cut into chunks, the tokens of a head side by side: [n, heads, Q, ...].

    Contiguous, because a batched product takes its fast path only where every matrix is in one piece.
    """
    x = pad_tokens(x_BTH, s.padding).unflatten(1, (s.chunks, s.Q))
    return x.transpose(0, 1).transpose(2, 3).contiguous().flatten(0, 1)


def tokens_first(x_nHQ: Tensor, s: Chunks) -> Tensor:
    """The inverse of `heads_first`: [B, T, heads, ...]."""
    x = x_nHQ.unflatten(0, (s.chunks, s.B)).transpose(2, 3).transpose(0, 1)
    return x.flatten(1, 2)[:, : s.T]


def pad_tokens(x_BT: Tensor, padding: int) -> Tensor:
    """Append `padding` zero tokens to dim 1."""
    if padding == 0:
        return x_BT
    return F.pad(x_BT, (0, 0) * (x_BT.dim() - 2) + (0, padding))


def cut_gates(g_BTHK: Tensor, document_ids_BT: Tensor | None) -> Tensor:
    """Gates of -inf at the first token of each document but the row's first: nothing before it reaches past it.

    Exponents are sums of gates and never differences, so that -inf stays -inf and its power is an exact zero.
    """
    if document_ids_BT is None:
        return g_BTHK
    begins_BT = document_ids_BT[:, 1:] != document_ids_BT[:, :-1]
    begins_BT = torch.cat([torch.zeros_like(begins_BT[:, :1]), begins_BT], dim=1)
    return g_BTHK.masked_fill(begins_BT[..., None, None], -torch.inf)


def compose_scores(lefts: Sequence[Tensor], k: Tensor, g: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
    """Scores [..., Q, Q] of rows with keys before and at them, and the sums of gates from the start and to the end [..., Q, K].

    All arguments are [..., Q, K]. A plain composition of differentiable operations, for the compiler. Above the diagonal
    scores are zero.

    `lefts` are queries, and for the delta rule keys as well: they share the decayed keys of a level. Returns
    one score matrix for each, then `from_start` and `to_end`.
    """
    lead, Q = g.shape[:-2], g.shape[-2]
    # Blocks of one token: a score with its own key, which nothing decays.
    all_scores = [(left * k).sum(-1)[..., None, None] for left in lefts]
    from_start, to_end = g[..., None, :], torch.zeros_like(g)[..., None, :]
    size = 1
    while size < Q:
        shape = (*lead, Q // (2 * size), 2, size, -1)
        starts, ends = from_start.reshape(shape), to_end.reshape(shape)
        keys = k.reshape(shape)[..., 0, :, :] * ends[..., 0, :, :].exp()
        factors = starts[..., 1, :, :].exp()
        for place, (left, scores) in enumerate(zip(lefts, all_scores, strict=True)):
            across = torch.matmul(left.reshape(shape)[..., 1, :, :] * factors, keys.transpose(-1, -2))
            own = scores.reshape(shape)
            upper = torch.cat([own[..., 0, :, :], torch.zeros_like(across)], dim=-1)
            all_scores[place] = torch.cat([upper, torch.cat([across, own[..., 1, :, :]], dim=-1)], dim=-2)
        # The sum of a half is that of its last token.
        whole = starts[..., -1:, :]
        from_start = torch.cat([starts[..., 0, :, :], starts[..., 1, :, :] + whole[..., 0, :, :]], dim=-2)
        to_end = torch.cat([ends[..., 0, :, :] + whole[..., 1, :, :], ends[..., 1, :, :]], dim=-2)
        size *= 2
    shape = (*lead, Q, -1)
    return [scores.reshape(shape) for scores in all_scores], from_start.reshape(shape), to_end.reshape(shape)


def walk_levels(g_NQK: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Factors <= 1 for every pair of neighbouring halves, from halves of one token to those of half a chunk.

    Yields (size of a half, factors [N, pairs, 2, size, K]): keys of the first half decay to its end, queries of the
    second from its start. Last comes (Q, factors [N, 2, Q, K]): the same for the whole chunk, queries from its start at
    1 and keys to its end at 0.

    Uses powers of 2 (`amfm.kernels.common.chunks`). The factors of a level are fresh memory; the sums they came from are
    updated in place, so a caller that goes through the levels backward collects them in a list first.
    """
    starts, ends = g_NQK * LOG2_E, torch.zeros_like(g_NQK)
    (N, Q, K), size = g_NQK.shape, 1
    while size < Q:
        shape = (N, Q // (2 * size), 2, size, K)
        first, second = ends.view(shape)[:, :, 0], starts.view(shape)[:, :, 1]
        factors = g_NQK.new_empty(shape)
        torch.exp2(first, out=factors[:, :, 0])
        torch.exp2(second, out=factors[:, :, 1])
        yield size, factors
        first += second[:, :, -1:]
        second += starts.view(shape)[:, :, 0, -1:]
        size *= 2
    yield Q, torch.stack([ends, starts], dim=1).exp2_()


def halves(x_NQX: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """First and second halves [N, pairs, size, X] of neighbouring pairs of blocks.

    Views: writing to them writes to x.
    """
    pairs = x_NQX.view(x_NQX.shape[0], -1, 2, size, x_NQX.shape[-1])
    return pairs[:, :, 0], pairs[:, :, 1]


def blocks_below(scores_NQQ: Tensor, size: int) -> Tensor:
    """The scores [N, size, size, pairs] of second halves with the first halves before them.

    A view of the scores, so that one level is written by one copy.
    """
    N, Q, _ = scores_NQQ.shape
    pairs = Q // (2 * size)
    return scores_NQQ.view(N, pairs, 2, size, pairs, 2, size)[:, :, 1, :, :, 0].diagonal(dim1=1, dim2=3)


def dot_rows(queries: Tensor, keys: Tensor) -> Tensor:
    """Products of each query row with each key row: [N, pairs, X, K], [N, pairs, size, K] to [N, pairs, X, size].

    Element by element for one or two keys, of which libraries are slow to make products.
    """
    if keys.shape[-2] <= 2:
        return (queries[..., :, None, :] * keys[..., None, :, :]).sum(-1)
    return torch.matmul(queries, keys.transpose(-1, -2))


def spread_rows(weights: Tensor, rows: Tensor) -> Tensor:
    """Product of weights [N, pairs, size, size] with rows [N, pairs, size, K].

    Element by element for one or two rows, as in `dot_rows`.
    """
    if rows.shape[-2] == 1:
        return weights * rows
    if rows.shape[-2] == 2:
        return torch.addcmul(weights[..., :1] * rows[..., :1, :], weights[..., 1:], rows[..., 1:, :])
    return torch.matmul(weights, rows)
