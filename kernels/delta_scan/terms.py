"""What the chunks of rows contribute to the gated delta product: README.md derives each term and names them as here.

Terms know how to apply a decay and its transpose; the walks in torch_impl.py know none of that, so they serve
scalar gates (`Terms`) and gates of each key channel (`VectorTerms`) alike. Letters: c chunks, Q tokens and M =
Q N steps of a chunk.

Inverses of batches of small triangular matrices, by matrix products.

Why the inverse and not a solve: the right-hand side holds the state, which is known only when the loop over
chunks gets there, while the inverse can be taken for all chunks beforehand. Source of the form: Yang et al.
2024 (arXiv 2406.06484), section 3.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from amfm.kernels.common.chunks import LOG2_E, Chunks, Documents, cut_documents, heads_first, pad_tokens, tokens_first

# Rows that are eliminated one after another; larger blocks are joined by products.
_LEAF = 16


def invert_unit_lower(strict_nMM: Tensor) -> Tensor:
    """(I + strict)^-1 for matrices [n, M, M], whose entries on and above the diagonal are taken as zeros.

    Diagonal blocks of 16 rows are inverted by elimination, all at once; two neighbours of inverses X and Z with the block
    Y below the first then make one: [[X, 0], [-Z Y X, Z]]. Products run at the speed of products, where triangular
    solves of small matrices do not, and no power of the matrix is taken, whose entries could be large.

    Returns [n, M, M] in the dtype of the argument; M need be no multiple of 16.
    """
    n, M, _ = strict_nMM.shape
    inverse = torch.zeros_like(strict_nMM)
    whole = [slice(start, start + _LEAF) for start in range(0, M - _LEAF + 1, _LEAF)]
    if whole:
        solved = _eliminate(torch.cat([strict_nMM[:, leaf, leaf] for leaf in whole]))
        for leaf, block in zip(whole, solved.split(n), strict=True):
            inverse[:, leaf, leaf] = block
    if M % _LEAF:
        rest = slice(len(whole) * _LEAF, M)
        inverse[:, rest, rest] = _eliminate(strict_nMM[:, rest, rest])
    size = _LEAF
    while size < M:
        for start in range(0, M - size, 2 * size):
            first, second = slice(start, start + size), slice(start + size, min(start + 2 * size, M))
            below = torch.bmm(strict_nMM[:, second, first], inverse[:, first, first])
            inverse[:, second, first] = torch.bmm(inverse[:, second, second], below).neg_()
        size *= 2
    return inverse


def _eliminate(strict_nLL: Tensor) -> Tensor:
    """(I + strict)^-1 column by column, with the matrices side by side in the last dim.

    That makes each update one operation over all matrices, [L - j, j + 1, n], with long contiguous rows.
    """
    strict_LLn = strict_nLL.permute(1, 2, 0).contiguous()
    inverse_LLn = torch.zeros_like(strict_LLn)
    inverse_LLn.diagonal().fill_(1.0)
    for j in range(len(strict_LLn) - 1):
        inverse_LLn[j + 1 :, : j + 1].addcmul_(strict_LLn[j + 1 :, j : j + 1], inverse_LLn[j, : j + 1], value=-1.0)
    return inverse_LLn.permute(2, 0, 1)


@dataclass
class ChunkedRows:
    """Rows cut into chunks, chunks and heads first: [c, B, G or H, tokens or steps, ...] in the dtype of beta.

    A chunk has Q tokens of N steps, M = Q N, those of a token next to each other.
    """

    sizes: Chunks
    N: int
    q: Tensor  # [c, B, G, Q, K]
    k: Tensor  # [c, B, G, M, K]
    v: Tensor  # [c, B, H, M, V]
    beta: Tensor  # [c, B, H, M, 1]

    @property
    def asked(self) -> Tensor:
        """What each step asks the state with: its key."""
        return self.k

    def heads_first(self, x_BTH: Tensor) -> Tensor:
        """[B, T, heads, ...] as [c, B, heads, Q, ...].

        For gradients of outputs, which have a row per token.
        """
        return steps_of_heads(x_BTH.unsqueeze(2), self.sizes, self.beta.dtype)

    def tokens_first(self, x_cBHX: Tensor, N: int | None = None) -> Tensor:
        """[c, B, heads, Q, ...] as [B, T, heads, ...], or [c, B, heads, M, ...] as [B, T, N, heads, ...]."""
        x = x_cBHX.transpose(0, 1).movedim(3, 2)
        if N is not None:
            x = x.unflatten(2, (-1, N))
        return x.flatten(1, 2)[:, : self.sizes.T]


@dataclass
class Terms(ChunkedRows):
    """What chunks contribute where a gate is a number per token and head. J gates per token: H, or one (zero) where
    nothing decays.
    """

    documents: Documents
    b_nJQ: Tensor  # times log2(e), for powers of 2
    decay: Tensor  # e^(b_i - b_j) for tokens j <= i of one document, 0 elsewhere, [c, B, J, Q, Q]

    @classmethod
    def of(
        cls,
        q_BTGK: Tensor,
        k_BTNGK: Tensor,
        v_BTNHV: Tensor,
        beta_BTNH: Tensor,
        g_BTH: Tensor | None,
        document_ids_BT: Tensor | None,
        chunk_tokens: int,
    ) -> Terms:
        """Cut rows into chunks of at most `chunk_tokens` tokens; beta and g are float32 (float64 for float64 inputs)."""
        B, T, N, H, V = v_BTNHV.shape
        G, K = q_BTGK.shape[2:]
        s, wide = Chunks.of(B, T, H, G, K, V, min(chunk_tokens, T)), beta_BTNH.dtype
        g_BTJ = beta_BTNH.new_zeros(B, T, 1) if g_BTH is None else g_BTH
        g_nJQ = heads_first(g_BTJ, s) * LOG2_E
        documents = cut_documents(document_ids_BT, s, g_nJQ)
        b_nJQ = documents.sum_inside(g_nJQ)
        decay_nJQQ = (b_nJQ[..., :, None] - b_nJQ[..., None, :]).add_(documents.bias).exp2_()
        return cls(
            s,
            N,
            steps_of_heads(q_BTGK.unsqueeze(2), s, wide),
            steps_of_heads(k_BTNGK, s, wide),
            steps_of_heads(v_BTNHV, s, wide),
            steps_of_heads(beta_BTNH.unsqueeze(-1), s, wide),
            documents,
            b_nJQ,
            decay_nJQQ.unflatten(0, (s.chunks, B)),
        )

    def weigh(self, scores_cBGRXM: Tensor) -> Tensor:
        """Numbers of pairs, of tokens or steps X with steps M, times the decay between their tokens; R is 1 or H / G.

        Decays belong to tokens, [Q, Q], and are spread over the N steps of each by views: no tensor of [M, M]
        decays is made.
        """
        s = self.sizes
        pairs = scores_cBGRXM.unflatten(-1, (s.Q, self.N)).unflatten(-3, (s.Q, -1))
        return (pairs * self._grouped(self.decay)[..., :, None, :, None]).flatten(-4, -3).flatten(-2)

    def interactions(self) -> Tensor:
        """A: (k_i . k_j) e^(b_i - b_j) for steps i and j of tokens j <= i, [c, B, H, M, M]. Only j < i counts."""
        return self._by_head(self.weigh(torch.matmul(self.k, self.k.mT).unsqueeze(3)))

    def mix(self) -> Tensor:
        """P: (q_i . k_j) e^(b_i - b_j) for tokens i and steps j of tokens up to i, [c, B, H, Q, M]."""
        return self._by_head(self.weigh(torch.matmul(self.q, self.k.mT).unsqueeze(3)))

    def weigh_gradient(self, gradient_cBHXM: Tensor) -> Tensor:
        """Gradient of the scores of a group [c, B, G, X, M] from that of its heads' weighed scores."""
        return self._sum_group(self.weigh(self._grouped(gradient_cBHXM)))

    def from_start(self, x_cBGXK: Tensor) -> Tensor:
        """Queries or keys times e^b where their token is in the document that owns the entering state, for each head."""
        return self._by_head(x_cBGXK.unsqueeze(3) * self._grouped(self._start_weights(x_cBGXK)))

    def to_end(self, x_cBGMK: Tensor) -> Tensor:
        """Keys times e^(b_end - b) where their token is in the chunk's last document, for each head."""
        return self._by_head(x_cBGMK.unsqueeze(3) * self._grouped(self._end_weights(x_cBGMK)))

    def from_start_gradient(self, gradient_cBHXK: Tensor) -> Tensor:
        """The transpose of `from_start`; takes its argument's memory."""
        return self._sum_group(self._grouped(gradient_cBHXK.mul_(self._start_weights(gradient_cBHXK))))

    def to_end_gradient(self, gradient_cBHMK: Tensor) -> Tensor:
        """The transpose of `to_end`; takes its argument's memory."""
        return self._sum_group(self._grouped(gradient_cBHMK.mul_(self._end_weights(gradient_cBHMK))))

    def carry(self) -> Tensor:
        """Factor of the entering state in the leaving one, [c, B, J, 1, 1].

        0 where the document that owns the entering state ends in the chunk.
        """
        carry_nJ = self.documents.keep_carry(self.b_nJQ[..., -1].exp2())
        return carry_nJ.view(self.sizes.chunks, self.sizes.B, -1, 1, 1)

    def gate_gradient(self, b_cBHQ: Tensor) -> Tensor:
        """Gradient of g [B, T, H] from that of its sums b.

        A token's gate is in the sums of all tokens after it in its document.
        """
        return tokens_first(self.documents.sum_inside_reversed(b_cBHQ.flatten(0, 1)), self.sizes)

    def _start_weights(self, like: Tensor) -> Tensor:
        """e^b for each row of `like`, 0 outside the document that owns the entering state."""
        return self._spread(self.documents.keep_first(self.b_nJQ.exp2()), like)

    def _end_weights(self, like: Tensor) -> Tensor:
        """e^(b_end - b) for each row of `like`, 0 outside the chunk's last document."""
        return self._spread(self.documents.keep_last(self.b_nJQ[..., -1:] - self.b_nJQ).exp2(), like)

    def _spread(self, x_nJQ: Tensor, like: Tensor) -> Tensor:
        """One number per token as one for each of its rows in `like`, [c, B, J, Q or M, 1]."""
        x_cBJQ = x_nJQ.unflatten(0, (self.sizes.chunks, self.sizes.B))
        repeats = like.shape[-2] // self.sizes.Q
        return (x_cBJQ if repeats == 1 else x_cBJQ.repeat_interleave(repeats, dim=-1)).unsqueeze(-1)

    def _grouped(self, x_cBJ: Tensor) -> Tensor:
        """[c, B, H, ...] as [c, B, G, R, ...], or [c, B, 1, ...] as [c, B, 1, 1, ...]."""
        s = self.sizes
        return x_cBJ.unsqueeze(2) if x_cBJ.shape[2] == 1 else x_cBJ.unflatten(2, (s.G, s.R))

    def _by_head(self, x_cBGR: Tensor) -> Tensor:
        """[c, B, G, 1 or R, ...] as [c, B, H, ...]."""
        return x_cBGR.expand(-1, -1, -1, self.sizes.R, *x_cBGR.shape[4:]).flatten(2, 3)

    def _sum_group(self, x_cBGR: Tensor) -> Tensor:
        """[c, B, G, R, ...] summed over the heads of a group."""
        return x_cBGR.squeeze(3) if self.sizes.R == 1 else x_cBGR.sum(3)


def steps_of_heads(x_BTNH: Tensor, s: Chunks, dtype: torch.dtype) -> Tensor:
    """[B, T, N, heads, ...] as [c, B, heads, Q N, ...].

    One pass that moves, widens and copies; the steps of a token stay next to each other.
    """
    cut = pad_tokens(x_BTNH, s.padding).unflatten(1, (s.chunks, s.Q)).transpose(0, 1).movedim(4, 2)
    return cut.to(dtype, copy=True, memory_format=torch.contiguous_format).flatten(3, 4)
