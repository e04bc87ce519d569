"""The indexer of DeepSeek sparse attention, which a mixer of softmax attention holds and asks what to read.

Narrow query heads and one key head score every key of the document; each token attends to the `top_k` highest. A choice has
no gradient, so the indexer learns from attention instead: its softmax follows what attention weighs, summed over heads. It
reads the residual stream detached, so its loss trains only the indexer, and the language model's loss never does. Two stages
(`IndexerConfig.stage`) begin with attention that is dense, from all of which the indexer learns, because what attention never
reads teaches nothing.

Ranks. Tensor ranks hold the whole indexer and must choose alike, so all of them score all tokens, and the weights of their
heads are summed before the loss. Context ranks gather the indexer's keys next to those of attention; queries of a rank's
segments choose among the keys up to their own. Decoding keeps the indexer's keys next to attention's.

Source: DeepSeek-AI 2025, DeepSeek-V3.2 (arXiv 2512.02556), section 2.1.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from amfm.kernels.rope.op import qk_norm_rope
from amfm.kernels.runtime.compiling import disable_compile
from amfm.kernels.sparse_attention.op import choose_keys, chosen_loss, sparse_attention, warm_up_loss
from amfm.kernels.sparse_attention.reference import IndexRows
from amfm.model.config.key_mixer_options import IndexerConfig
from amfm.model.mixers.interface import BuildContext
from amfm.model.packing import PackMeta
from amfm.model.parallel.context import gather_rows
from amfm.model.parallel.layers import Float32Buffers, Linear
from amfm.model.parallel.regions import gather_stream, sum_values
from amfm.model.parallel.shards import REPLICATED

# As transformers' deepseek_v32.
_NORM_EPSILON = 1e-6
NORM_BIAS = "indexer.key_norm.bias"  # below the mixer; 0 at first


class Indexer(Float32Buffers):
    """score(t, s) = sum_i weight_ti relu(q_ti . k_s) / sqrt(heads x channels); q, k and weights from a detached stream.

    q comes from `query_width` numbers per token (the latent of queries, or the residual stream), k passes a LayerNorm; both are rotated
    on their first channels, where attention is.
    """

    def __init__(self, options: IndexerConfig, query_width: int, build: BuildContext) -> None:
        super().__init__()
        self.options, self.build, self.is_sparse = options, build, options.stage == "sparse"
        groups, heads, size = build.groups, options.num_heads, options.head_dim
        self.query = Linear(query_width, heads * size, groups)
        self.key = Linear(build.hidden_size, size, groups)
        self.head_weights = Linear(build.hidden_size, heads, groups)
        for layer in (self.query, self.key, self.head_weights):
            # All ranks read all tokens, under sequence parallelism too.
            layer.shards = {"weight": REPLICATED}
        self.key_norm = nn.LayerNorm(size, eps=_NORM_EPSILON)
        self.attention_factor = 1.0
        self.inverse_frequencies: Tensor | None
        self.register_buffer("inverse_frequencies", None, persistent=False)

    def rows(self, x_BTD: Tensor, query_BTX: Tensor, meta: PackMeta) -> IndexRows:
        """Project the residual stream x [B, T, D], and what queries are made of: queries of this context rank, keys of whole rows.

        Every rank of `groups.tp` and `groups.cp` must call: under sequence parallelism tokens are gathered.
        """
        groups, (heads, size) = self.build.groups, (self.options.num_heads, self.options.head_dim)
        is_same = query_BTX is x_BTD
        x_BTD = gather_stream(x_BTD.detach(), groups)
        query_BTX = x_BTD if is_same else gather_stream(query_BTX.detach(), groups)
        q_BTIC = self.query(query_BTX).unflatten(-1, (heads, size))
        k_BTC = self.key_norm(self.key(x_BTD))
        if self.inverse_frequencies is not None:
            q_BTIC, k_BT1C = qk_norm_rope(
                q_BTIC,
                k_BTC.unsqueeze(2),
                meta.positions_BT,
                self.inverse_frequencies,
                self.attention_factor,
                backend=self.build.backend,
            )
            k_BTC = k_BT1C.squeeze(2)
        if meta.segments is not None:
            k_BTC = gather_rows(k_BTC.unsqueeze(0), meta.segments, groups).squeeze(0)
        return IndexRows(q_BTIC, k_BTC, self.head_weights(x_BTD) * (heads * size) ** -0.5)

    def sparse_rows(self, x_BTD: Tensor, query_BTX: Tensor, meta: PackMeta) -> IndexRows | None:
        """As `rows` where keys are chosen now; None in the warm-up."""
        return self.rows(x_BTD, query_BTX, meta) if self.is_sparse else None

    def no_keys(self, num_rows: int) -> Tensor | None:
        """The keys of a decode state before the first token, [B, 0, C], where keys are chosen now."""
        return self.key.weight.new_zeros(num_rows, 0, self.options.head_dim) if self.is_sparse else None

    @disable_compile  # blocks of queries would each be compiled
    def attend(
        self,
        index: IndexRows,
        q_BTHK: Tensor,
        k_BSJK: Tensor,
        v_BSJV: Tensor | int,
        meta: PackMeta,
        *,
        scale: float,
        highest_H: Tensor | None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Attend to the chosen keys of whole rows -> [B, T, H, V], and in training the loss; values as `sparse_attention` takes them.

        Every rank of `groups.tp` and `groups.cp` must call.
        """
        backend, outputs, losses = self.build.backend, [], []
        for queries, seen, ids_BS in _pieces(meta, index.k_BSC.shape[1]):
            part = _part(index, queries, seen)
            places_BLN = choose_keys(part, top_k=self.options.top_k, document_ids_BS=ids_BS, backend=backend)
            k, v = k_BSJK[:, :seen], v_BSJV if isinstance(v_BSJV, int) else v_BSJV[:, :seen]
            o_BLHV, mass_BLN = sparse_attention(
                q_BTHK[:, queries], k, v, places_BLN, scale=scale, highest_H=highest_H, backend=backend
            )
            outputs.append(o_BLHV)
            if self.training:
                mass_BLN = sum_values(mass_BLN, self.build.groups)
                losses.append(chosen_loss(part, places_BLN, mass_BLN, backend=backend))
        return torch.cat(outputs, dim=1), self._mean(losses, index)

    @disable_compile
    def loss(
        self, x_BTD: Tensor, query_BTX: Tensor, q_BTHK: Tensor, k_BSJK: Tensor, meta: PackMeta, *, scale: float
    ) -> dict[str, Tensor]:
        """The loss of the warm-up: x and `query_BTX` as in `rows`, the queries and keys of dense attention here.

        Every rank of `groups.tp` and `groups.cp` must call.
        """
        index, k_BSJK = self.rows(x_BTD, query_BTX, meta), k_BSJK.detach()
        if meta.segments is not None:
            k_BSJK = gather_rows(k_BSJK.unsqueeze(0), meta.segments, self.build.groups).squeeze(0)
        losses = [
            warm_up_loss(
                _part(index, queries, seen),
                q_BTHK[:, queries],
                k_BSJK[:, :seen],
                scale=scale,
                document_ids_BS=ids_BS,
                sum_heads=partial(sum_values, groups=self.build.groups),
                backend=self.build.backend,
            )
            for queries, seen, ids_BS in _pieces(meta, index.k_BSC.shape[1])
        ]
        return self._mean(losses, index)

    def _mean(self, losses: list[Tensor], index: IndexRows) -> dict[str, Tensor]:
        """This context rank's share of the weighted mean over tokens; all tensor ranks have the same."""
        tokens = index.q_BTIC.shape[0] * index.q_BTIC.shape[1] * self.build.groups.cp.size()
        return {"indexer": sum(losses[1:], losses[0]) * (self.options.loss_weight / tokens)} if losses else {}


def _pieces(meta: PackMeta, keys: int) -> Iterator[tuple[slice, int, Tensor | None]]:
    """Queries whose last one sees `seen` keys of the row, `seen`, and the documents of these keys."""
    if meta.segments is None:
        yield slice(None), keys, meta.boundaries_BT()
        return
    segments = meta.segments
    for place, number in enumerate(segments.own):
        seen = (number + 1) * segments.length
        ids_BS = None if meta.single_document else segments.document_ids_BT[:, :seen]
        yield slice(place * segments.length, (place + 1) * segments.length), seen, ids_BS


def _part(index: IndexRows, queries: slice, seen: int) -> IndexRows:
    return IndexRows(index.q_BTIC[:, queries], index.k_BSC[:, :seen], index.weight_BTI[:, queries])
