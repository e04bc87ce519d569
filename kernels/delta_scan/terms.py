"""What the chunks of rows contribute to the gated delta product: README.md derives each term and names them as here."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.chunks import Chunks, Documents, cut_documents, pad_tokens


@dataclass
class Terms:
    """Rows cut into chunks, heads first: [B, G or H, chunks, tokens or steps, ...] in the wide dtype, that of beta.

    A chunk has Q tokens of N steps, M = Q N, those of a token next to each other. J gates a token: H, or one (zero)
    where nothing decays. Products take operands in the dtype `gemm`.
    """

    sizes: Chunks
    N: int
    documents: Documents
    q: Tensor  # [B, G, chunks, Q, K]
    k: Tensor  # [B, G, chunks, M, K]
    v: Tensor  # [B, H, chunks, M, V]
    beta: Tensor  # [B, H, chunks, M, 1]
    b_nJQ: Tensor
    decay: Tensor  # e^(b_i - b_j) for tokens j <= i of one document, 0 elsewhere, [B, J, chunks, Q, Q]
    gemm: torch.dtype

    @classmethod
    def of(
        cls,
        q_BTGK: Tensor,
        k_BTNGK: Tensor,
        v_BTNHV: Tensor,
        beta_BTNH: Tensor,
        g_BTH: Tensor | None,
        document_ids_BT: Tensor | None,
        chunk_size: int,
        gemm: torch.dtype,
    ) -> Terms:
        """Cut rows into chunks of at most `chunk_size` tokens; beta and g are in the wide dtype."""
        B, T, N, H, V = v_BTNHV.shape
        G, K = q_BTGK.shape[2:]
        s, wide = Chunks.of(B, T, H, G, K, V, min(chunk_size, T)), beta_BTNH.dtype
        g_BTJ = beta_BTNH.new_zeros(B, T, 1) if g_BTH is None else g_BTH
        g_nJQ = pad_tokens(g_BTJ, s.padding).reshape(s.count, s.Q, -1).transpose(1, 2).contiguous()
        documents = cut_documents(document_ids_BT, s, g_nJQ)
        b_nJQ = documents.sum_inside(g_nJQ)
        b_BJcQ = _rows_first(b_nJQ, s)
        bias = documents.bias if document_ids_BT is None else _rows_first(documents.bias, s)
        return cls(
            s,
            N,
            documents,
            _heads_first(q_BTGK.unsqueeze(2), s, wide),
            _heads_first(k_BTNGK, s, wide),
            _heads_first(v_BTNHV, s, wide),
            _heads_first(beta_BTNH.unsqueeze(-1), s, wide),
            b_nJQ,
            (b_BJcQ[..., :, None] - b_BJcQ[..., None, :]).add_(bias).exp_(),
            gemm,
        )

    def product(self, left: Tensor, right: Tensor) -> Tensor:
        """left @ right, wide."""
        return torch.matmul(left.to(self.gemm), right.to(self.gemm)).to(self.beta.dtype)

    def weigh(self, scores_BGRcXM: Tensor) -> Tensor:
        """Numbers of pairs, of tokens or steps X with steps M, times the decay between their tokens; R is 1 or H / G."""
        s = self.sizes
        pairs = scores_BGRcXM.unflatten(-1, (s.Q, self.N)).unflatten(-3, (s.Q, -1))
        return (pairs * self._grouped(self.decay)[..., :, None, :, None]).flatten(-4, -3).flatten(-2)

    def interactions(self) -> Tensor:
        """A: (k_i . k_j) e^(b_i - b_j) for steps i and j of tokens j <= i, [B, H, chunks, M, M]. Only j < i counts."""
        return self._by_head(self.weigh(torch.matmul(self.k, self.k.mT).unsqueeze(2)))

    def mix(self) -> Tensor:
        """P: (q_i . k_j) e^(b_i - b_j) for tokens i and steps j of tokens up to i, [B, H, chunks, Q, M]."""
        return self._by_head(self.weigh(self.product(self.q, self.k.mT).unsqueeze(2)))

    def weigh_gradient(self, gradient_BHcXM: Tensor) -> Tensor:
        """Gradient of the scores of a group [B, G, chunks, X, M] from that of its heads' weighed scores."""
        return self._sum_group(self.weigh(self._grouped(gradient_BHcXM)))

    def from_start(self, x_BGcXK: Tensor) -> Tensor:
        """Queries or keys times e^b where their token lies in the document that owns the entering state, [B, H, ...]."""
        return self._by_head(x_BGcXK.unsqueeze(2) * self._grouped(self._start_weights(x_BGcXK)))

    def to_end(self, x_BGcMK: Tensor) -> Tensor:
        """Keys times e^(b_end - b) where their token lies in the chunk's last document, [B, H, ...]."""
        return self._by_head(x_BGcMK.unsqueeze(2) * self._grouped(self._end_weights(x_BGcMK)))

    def from_start_gradient(self, gradient_BHcXK: Tensor) -> Tensor:
        """The transpose of `from_start`."""
        return self._sum_group(self._grouped(gradient_BHcXK * self._start_weights(gradient_BHcXK)))

    def to_end_gradient(self, gradient_BHcMK: Tensor) -> Tensor:
        """The transpose of `to_end`."""
        return self._sum_group(self._grouped(gradient_BHcMK * self._end_weights(gradient_BHcMK)))

    def carry(self) -> Tensor:
        """Factor of the entering state in the leaving one, [B, J, chunks, 1, 1]."""
        return _rows_first(self.documents.keep_carry(self.b_nJQ[..., -1].exp()), self.sizes)[..., None, None]

    def gate_gradient(self, b_BHcQ: Tensor) -> Tensor:
        """Gradient of g [B, T, H] from that of its sums b."""
        s = self.sizes
        d_g_nHQ = self.documents.sum_inside_reversed(b_BHcQ.transpose(1, 2).reshape(s.count, s.H, s.Q))
        return d_g_nHQ.transpose(1, 2).reshape(s.B, -1, s.H)[:, : s.T]

    def heads_first(self, x_BTH: Tensor) -> Tensor:
        """[B, T, heads, ...] as [B, heads, chunks, Q, ...]."""
        return _heads_first(x_BTH.unsqueeze(2), self.sizes, self.beta.dtype)

    def tokens(self, x_BHcX: Tensor, N: int | None = None) -> Tensor:
        """[B, heads, chunks, Q, ...] as [B, T, heads, ...], or [B, heads, chunks, M, ...] as [B, T, N, heads, ...]."""
        x = x_BHcX.movedim(1, 3)
        if N is not None:
            x = x.unflatten(2, (-1, N))
        return x.flatten(1, 2)[:, : self.sizes.T]

    def _start_weights(self, like: Tensor) -> Tensor:
        return self._spread(self.documents.keep_first(self.b_nJQ.exp()), like)

    def _end_weights(self, like: Tensor) -> Tensor:
        return self._spread(self.documents.keep_last(self.b_nJQ[..., -1:] - self.b_nJQ).exp(), like)

    def _spread(self, x_nJQ: Tensor, like: Tensor) -> Tensor:
        """One number a token as one for each of its rows in `like`, [B, J, chunks, Q or M, 1]."""
        x_BJcQ = _rows_first(x_nJQ, self.sizes)
        repeats = like.shape[-2] // self.sizes.Q
        return (x_BJcQ if repeats == 1 else x_BJcQ.repeat_interleave(repeats, dim=-1)).unsqueeze(-1)

    def _grouped(self, x_BJ: Tensor) -> Tensor:
        """[B, H, ...] as [B, G, R, ...], or [B, 1, ...] as [B, 1, 1, ...]."""
        s = self.sizes
        return x_BJ.unsqueeze(1) if x_BJ.shape[1] == 1 else x_BJ.unflatten(1, (s.G, s.R))

    def _by_head(self, x_BGR: Tensor) -> Tensor:
        """[B, G, 1 or R, ...] as [B, H, ...]."""
        return x_BGR.expand(-1, -1, self.sizes.R, *x_BGR.shape[3:]).flatten(1, 2)

    def _sum_group(self, x_BGR: Tensor) -> Tensor:
        """[B, G, R, ...] summed over the heads of a group."""
        return x_BGR.squeeze(2) if self.sizes.R == 1 else x_BGR.sum(2)


def _rows_first(x_nJ: Tensor, s: Chunks) -> Tensor:
    """[B chunks, J, ...] as [B, J, chunks, ...]."""
    return x_nJ.unflatten(0, (s.B, s.chunks)).transpose(1, 2)


def _heads_first(x_BTNH: Tensor, s: Chunks, dtype: torch.dtype) -> Tensor:
    """[B, T, N, heads, ...] as [B, heads, chunks, Q N, ...]."""
    cut = pad_tokens(x_BTNH, s.padding).unflatten(1, (s.chunks, s.Q)).movedim(4, 1)
    return cut.to(dtype, memory_format=torch.contiguous_format).flatten(3, 4)
