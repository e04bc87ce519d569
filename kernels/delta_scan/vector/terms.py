"""What chunks contribute to the delta rule where each key channel has its own gate: README.md of delta_scan derives it.

One step a token, as many key heads as heads. Documents are cut by gates of -inf (kernels/common/chunks.py), so that no mask
is needed here.

How: scores of queries and of keys with earlier keys are taken together, because they share the decayed keys of
every level. A gate's gradient comes from the gradients of the factors that hold it, handed down the levels as
the sums were built up.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from amfm.kernels.common.chunks import (
    Chunks,
    blocks_below,
    compose_scores,
    dot_rows,
    halves,
    spread_rows,
    walk_levels,
)
from amfm.kernels.delta_scan.terms import ChunkedRows, steps_of_heads


@dataclass
class VectorTerms(ChunkedRows):
    """As `Terms`, with N = 1 and G = H; N in names of tensors is the number of all chunks and heads."""

    g_NQK: Tensor
    start: Tensor  # e^b, [c, B, H, Q, K]
    end: Tensor  # e^(b_end - b), [c, B, H, Q, K]
    scores: Tensor  # of queries and of what is asked with keys up to them, decayed; [c, B, H, 2, Q, Q], zeros above the diagonal
    erase: Tensor | None = None  # [c, B, H, Q, K], in place of k where the state is asked

    @classmethod
    def of(
        cls,
        q_BTHK: Tensor,
        k_BTNHK: Tensor,
        v_BTNHV: Tensor,
        beta_BTNH: Tensor,
        g_BTHK: Tensor,
        chunk_tokens: int,
        scores: Tensor | None = None,
        *,
        erase_BTHK: Tensor | None = None,
        composed: bool = False,
    ) -> VectorTerms:
        """Cut rows into chunks of `chunk_tokens` tokens, a power of two, or of fewer for short rows.

        g are what `cut_gates` returned. `scores`, where they were computed before, are taken as they are. `composed`: as
        a plain composition of differentiable operations.
        """
        B, T, _, H, V = v_BTNHV.shape
        K, wide = q_BTHK.shape[3], beta_BTNH.dtype
        s = Chunks.of(B, T, H, H, K, V, min(chunk_tokens, 1 << (T - 1).bit_length()))
        q, k = steps_of_heads(q_BTHK.unsqueeze(2), s, wide), steps_of_heads(k_BTNHK, s, wide)
        v, beta = steps_of_heads(v_BTNHV, s, wide), steps_of_heads(beta_BTNH.unsqueeze(-1), s, wide)
        g = steps_of_heads(g_BTHK.unsqueeze(2), s, wide)
        erase = None if erase_BTHK is None else steps_of_heads(erase_BTHK.unsqueeze(2), s, wide)
        asked = k if erase is None else erase
        lead, g_NQK = (s.chunks, B, H), g.flatten(0, 2)
        if composed:
            both, start, end = compose_scores((q, asked), k, g)
            return cls(s, 1, q, k, v, beta, g_NQK, start.exp(), end.exp(), torch.stack(both, dim=3), erase)
        if scores is None:
            of_pairs, factors = _score(q.flatten(0, 2), asked.flatten(0, 2), k.flatten(0, 2), g_NQK)
            scores = of_pairs.view(*lead, 2, s.Q, s.Q)
        else:
            factors = whole_factors(g_NQK)
        start, end = (x.reshape(*lead, s.Q, K) for x in (factors[:, 1], factors[:, 0]))
        return cls(s, 1, q, k, v, beta, g_NQK, start, end, scores, erase)

    @property
    def asked(self) -> Tensor:
        """What each token asks the state with: its key, or what stands in its place."""
        return self.k if self.erase is None else self.erase

    def interactions(self) -> Tensor:
        """asked_i . k_j with the decay between them, [c, B, H, Q, Q]. Only j < i counts.

        A copy, because the walk scales it in place and the scores are kept.
        """
        return self.scores[..., 1, :, :].clone()

    def mix(self) -> Tensor:
        """q_i . k_j with the decay between them for j <= i, [c, B, H, Q, Q]."""
        return self.scores[..., 0, :, :]

    def from_start(self, x_cBHQK: Tensor) -> Tensor:
        """Queries or keys decayed from the chunk's start, 0 where the entering state has ended."""
        return x_cBHQK * self.start

    def to_end(self, x_cBHQK: Tensor) -> Tensor:
        """Keys decayed to the chunk's end."""
        return x_cBHQK * self.end

    def carry(self) -> Tensor:
        """Factor of each row of the entering state in the leaving one, [c, B, H, K, 1]."""
        return self.start[..., -1, :, None]

    def score_gradients(self, d_scores: Tensor, sums: ScoreSums) -> None:
        """Add to the gradients in `sums` what they get through the scores, from d_scores [N, 2, Q, Q].

        From the largest halves to single tokens, the reverse of forward; the diagonal has no decay and comes
        last.
        """
        q, k, asked = (x.flatten(0, 2) for x in (self.q, self.k, self.asked))
        both = torch.stack([q, asked], dim=1)
        *levels, _ = walk_levels(self.g_NQK)
        for size, factors in reversed(levels):
            _differentiate_level(both, k, size, factors, d_scores, sums)
        own = d_scores[:, 0].diagonal(dim1=1, dim2=2)[..., None]
        sums.q.addcmul_(own, k)
        sums.k.addcmul_(own, q)


@dataclass
class ScoreSums:
    """Gradients [N, Q, K] of q, k, asked, and of the sums of gates from a block's start to each token and from it to the end.

    Once all levels are done, `starts` is the gradient of the gates. Where keys ask, asked is the tensor of k.
    """

    q: Tensor
    k: Tensor
    asked: Tensor
    starts: Tensor
    ends: Tensor


def whole_factors(g_NQK: Tensor) -> Tensor:
    """[N, 2, Q, K]: keys decayed to the end of the chunk, and queries from its start."""
    *_, (_, factors) = walk_levels(g_NQK)
    return factors


def _score(q_NQK: Tensor, asked_NQK: Tensor, k_NQK: Tensor, g_NQK: Tensor) -> tuple[Tensor, Tensor]:
    """Scores [N, 2, Q, Q] of queries and of what asks with keys before them (queries also with their own), and the whole factors.

    Returns scores and factors as `walk_levels` gives them for the whole chunk.
    """
    N, Q, _ = q_NQK.shape
    both = torch.stack([q_NQK, asked_NQK], dim=1)
    scores = q_NQK.new_zeros(N, 2, Q, Q)
    scores[:, 0].diagonal(dim1=1, dim2=2).copy_((q_NQK * k_NQK).sum(-1))
    for size, factors in walk_levels(g_NQK):
        if size == Q:
            return scores, factors
        keys = halves(k_NQK, size)[0] * factors[:, :, 0]
        products = dot_rows(_second_halves(both, size, factors), keys).unflatten(2, (2, size))
        for which in (0, 1):
            blocks_below(scores[:, which], size).copy_(products[:, :, which].permute(0, 2, 3, 1))
    raise AssertionError("the last level is the whole chunk")


def _second_halves(both_N2QK: Tensor, size: int, factors: Tensor) -> Tensor:
    """Queries and then what asks of second halves, decayed from the middle of their block: [N, pairs, 2 size, K]."""
    N, _, Q, K = both_N2QK.shape
    seconds = both_N2QK.view(N, 2, Q // (2 * size), 2, size, K)[:, :, :, 1].transpose(1, 2)
    return (seconds * factors[:, :, 1].unsqueeze(2)).flatten(2, 3)


def _differentiate_level(
    both: Tensor, k_NQK: Tensor, size: int, factors: Tensor, d_scores: Tensor, sums: ScoreSums
) -> None:
    """Add what the pairs of one level give to the gradients in `sums`.

    The sums of a level were made from those of its halves, so their gradients are handed down first.
    """
    (d_first, d_second), d_to_end = halves(sums.starts, size), halves(sums.ends, size)[0]
    d_first[:, :, -1] += d_second.sum(2)
    d_second[:, :, -1] += d_to_end.sum(2)
    keys, asked = halves(k_NQK, size)[0], halves(both[:, 1], size)[1]
    own_queries = halves(both[:, 0], size)[1]
    blocks = [blocks_below(d_scores[:, which], size).permute(0, 3, 1, 2) for which in (0, 1)]
    d_block = torch.cat(blocks, dim=2)
    of_seconds = spread_rows(d_block, keys * factors[:, :, 0]).unflatten(2, (2, size)) * factors[:, :, 1].unsqueeze(2)
    of_queries, of_asked = of_seconds.unbind(2)
    of_keys = torch.matmul(d_block.transpose(-1, -2), _second_halves(both, size, factors)).mul_(factors[:, :, 0])
    halves(sums.q, size)[1].add_(of_queries)
    halves(sums.k, size)[0].add_(of_keys)
    halves(sums.asked, size)[1].add_(of_asked)
    d_second.addcmul_(of_queries, own_queries).addcmul_(of_asked, asked)
    d_to_end.addcmul_(of_keys, keys)
