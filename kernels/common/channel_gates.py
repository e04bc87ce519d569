"""Gates of each key channel inside a chunk, as sums over halves of halves, which the decay and the delta scans share.

A pair of tokens parts at the middle of the smallest aligned block of 2^n tokens that holds both: the later one's query and
the earlier one's key are decayed to there. Both exponents are sums of gates and at most 0, so nothing overflows however
strong the gates are, and a gate of -inf cuts a document off exactly (kernels/decay_scan/README.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from amfm.kernels.common.chunks import LOG2_E


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
