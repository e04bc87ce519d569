"""The attention block's mixer: causal grouped-query attention (Ainslie et al. 2023, arXiv 2305.13245).

Context ranks gather the keys and values of whole rows, and each computes its own queries. In hybrids attention blocks are
few and key-value heads fewer, so one all-gather moves little; passing blocks of keys around a ring would overlap better,
but needs partial softmaxes to be merged and as many steps as ranks. Segments are taken from both ends of a row, so that
every rank has equally many keys to read (`model/segments.py`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from amfm.kernels.attention.op import attention, fastest_backend
from amfm.kernels.attention.varlen import DocumentEnds
from amfm.kernels.rope.op import Llama3Numbers, qk_norm_rope, rope_frequencies
from amfm.model.config.core_options import AttentionConfig
from amfm.model.config.rope import Llama3Stretch, RopeConfig
from amfm.model.mixers.interface import AttentionCache, BlockState, BuildContext, MixerOutput, SoftmaxMixer
from amfm.model.mixers.shared_layers import HeadNorm, WideNorm, gate_heads, gate_projection, query_norm
from amfm.model.mixers.sparse.indexer import Indexer
from amfm.model.packing import PackMeta
from amfm.model.parallel.context import gather_rows
from amfm.model.parallel.groups import ProcessGroupCollection
from amfm.model.parallel.layers import ColumnLinear, RowLinear, project_layers
from amfm.model.parallel.shards import Shard, ShardSpec, divide, divide_units
from amfm.model.segments import Segments


class AttentionMixer(SoftmaxMixer):
    """q, k, v projections, optional norm a head, optional rotary positions, attention inside each document, optional gate,
    o_proj.

    Query and key-value heads are cut over the tensor-parallel ranks; where key-value heads are fewer, neighbouring ranks hold
    the same one. Positions restart at each document. Rotation angles and the softmax are computed in float32 for bf16
    weights.
    """

    def __init__(self, section: AttentionConfig, build: BuildContext) -> None:
        super().__init__()
        groups = build.groups
        self.section, self.backend, self.epsilon = section, build.backend, build.norm_epsilon
        self.groups = groups
        self.head_dim, self.scale = section.head_dim, section.softmax_scale or section.head_dim**-0.5
        self.num_heads = divide(section.num_heads, groups, "model.attention.num_heads")
        self.num_kv_heads = divide_units(section.num_kv_heads, groups, "model.attention.num_kv_heads")
        query_width, kv_width = section.num_heads * self.head_dim, section.num_kv_heads * self.head_dim
        hidden, kv_name, kv_units = build.hidden_size, "model.attention.num_kv_heads", (section.num_kv_heads,)
        has_bias = bool(section.bias)
        self.q_proj = ColumnLinear(
            hidden,
            (query_width,),
            groups,
            name="model.attention.num_heads",
            units=(section.num_heads,),
            bias=has_bias,
        )
        self.k_proj = ColumnLinear(hidden, (kv_width,), groups, name=kv_name, units=kv_units, bias=has_bias)
        self.v_proj = ColumnLinear(hidden, (kv_width,), groups, name=kv_name, units=kv_units, bias=has_bias)
        self.o_proj = RowLinear(
            query_width, hidden, groups, name="model.attention.num_heads", bias=section.bias is True
        )
        self.g_proj = gate_projection(
            section.gate, hidden, section.num_heads, self.head_dim, groups, name="model.attention.num_heads"
        )
        self.sinks = None
        if section.sinks:
            self.sinks, self.shards = make_sinks(section.num_heads, groups, "model.attention.num_heads")
        self.q_norm = query_norm(section.qk_norm, section.num_heads, self.head_dim, build)
        self.k_norm = query_norm(section.qk_norm, section.num_kv_heads, self.head_dim, build)
        self.indexer = None if section.indexer is None else Indexer(section.indexer, hidden, build)
        self.attention_factor = 1.0
        self.inverse_frequencies: Tensor | None
        self.register_buffer("inverse_frequencies", None, persistent=False)
        self.reset_buffers()

    @property
    def is_graphable(self) -> bool:
        """Where our kernels attend, which find documents on the device; not with an indexer."""
        return self.backend == "triton" and self.indexer is None

    def reset_buffers(self) -> None:
        """Compute the rotary frequencies again, float32, on the device of the weights."""
        if self.section.positions == "none":
            return
        device = self.q_proj.weight.device
        frequencies, self.attention_factor = frequencies_of(self.section.rope, self.head_dim)
        self.inverse_frequencies = frequencies.to(device)
        if self.indexer is not None:
            own = self.indexer.options
            found = frequencies_of(self.section.rope, own.head_dim, own.rope_fraction)
            frequencies, self.indexer.attention_factor = found
            self.indexer.inverse_frequencies = frequencies.to(device)

    def forward(self, x_BTD: Tensor, meta: PackMeta, state: BlockState = None) -> MixerOutput:
        """Mix x [B, T, D] -> y [B, T, D]; with a cache the tokens also see its keys, and the longer cache is returned.

        Cached keys are normed and rotated already. Every rank of `groups.tp` and `groups.cp` must call.
        """
        layers = [self.q_proj, self.k_proj, self.v_proj, *([] if self.g_proj is None else [self.g_proj])]
        q_BTX, k_BTX, v_BSX, *gate_BTX = project_layers(x_BTD, layers, self.groups)
        q_BTHK = self._heads(q_BTX, self.q_norm)
        k_BTJK = self._heads(k_BTX, self.k_norm)
        v_BSJK = v_BSX.unflatten(-1, (self.num_kv_heads, self.head_dim))
        if isinstance(self.q_norm, HeadNorm) or self.inverse_frequencies is not None:
            q_BTHK, k_BTJK = qk_norm_rope(
                q_BTHK,
                k_BTJK,
                meta.positions_BT,
                self.inverse_frequencies,
                self.attention_factor,
                q_weight_K=self.q_norm.weight if isinstance(self.q_norm, HeadNorm) else None,
                k_weight_K=self.k_norm.weight if isinstance(self.k_norm, HeadNorm) else None,
                epsilon=self.epsilon,
                backend=self.backend,
            )
        k_BSJK, cache, auxiliary = k_BTJK, None, None
        index = None if self.indexer is None else self.indexer.sparse_rows(x_BTD, x_BTD, meta)
        if state is not None:
            assert isinstance(state, AttentionCache), f"an attention block got a {type(state).__name__}"
            k_BSJK = torch.cat([state.k_BSJK, k_BTJK], dim=1)
            v_BSJK = torch.cat([state.v_BSJK, v_BSJK], dim=1)
            index = None if index is None else index.after(state.index_k_BSC)
            cache = AttentionCache(k_BSJK, v_BSJK, None if index is None else index.k_BSC)
        assert meta.segments is None or state is None, "rows that are cut over context ranks have no decode state"
        if self.indexer is not None and index is not None:
            if meta.segments is not None:
                k_BSJK, v_BSJK = gather_rows(torch.stack([k_BSJK, v_BSJK]), meta.segments, self.groups).unbind()
            o_BTHK, auxiliary = self.indexer.attend(
                index, q_BTHK, k_BSJK, v_BSJK, meta, scale=self.scale, highest_H=self.noted_logits()
            )
        else:
            o_BTHK = attend(
                q_BTHK,
                k_BSJK,
                v_BSJK,
                meta,
                self.groups,
                scale=self.scale,
                backend=self.backend,
                sinks_H=self.sinks,
                highest_H=self.noted_logits(),
            )
            if self.indexer is not None and self.training:
                auxiliary = self.indexer.loss(x_BTD, x_BTD, q_BTHK, k_BSJK, meta, scale=self.scale)
        if gate_BTX:
            o_BTHK = gate_heads(o_BTHK, gate_BTX[0])
        return MixerOutput(self.o_proj.leave(o_BTHK.flatten(-2), self.groups), cache, auxiliary)

    def _heads(self, x_BTX: Tensor, norm: nn.Module | None) -> Tensor:
        """Heads [B, T, H, K] of a projection, which a norm over all of them comes before."""
        wide_BTX: Tensor = norm(x_BTX) if isinstance(norm, WideNorm) else x_BTX
        return wide_BTX.unflatten(-1, (-1, self.head_dim))

    def empty_state(self, num_rows: int) -> AttentionCache:
        """Build the cache before the first token: [B, 0, J, K], in the dtype of the weights."""
        empty = self.k_proj.weight.new_zeros(num_rows, 0, self.num_kv_heads, self.head_dim)
        return AttentionCache(empty, empty, None if self.indexer is None else self.indexer.no_keys(num_rows))

    def scale_logits(self, factors_H: Tensor) -> dict[nn.Parameter, Tensor]:
        """Only queries: keys are those of several heads."""
        rows = factors_H.repeat_interleave(self.head_dim)
        return {each: rows for each in (self.q_proj.weight, self.q_proj.bias) if each is not None}

    def init_parameter(self, name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor | None:
        """Sinks begin at 0, the score of a key that says nothing, and so do biases."""
        return torch.zeros(shape) if name == "sinks" or name.endswith(".bias") else None

    def sequence_flops(self, sequence_length: int) -> float:
        """FLOPs per token of scores and of the values that they weigh."""
        return self.section.sequence_flops(sequence_length) / self.groups.tp.size()

    def set_rope(self, rope: RopeConfig) -> None:
        """Compute the rotary frequencies of other positions."""
        self.section = self.section.model_copy(update={"rope": rope})
        self.reset_buffers()


def frequencies_of(rope: RopeConfig, size: int, fraction: float | None = None) -> tuple[Tensor, float]:
    """Rotary frequencies of heads of so many channels, and the factor on cosine and sine; fraction: in place of the section's."""
    return rope_frequencies(
        size,
        theta=rope.theta,
        fraction=rope.fraction if fraction is None else fraction,
        scaling=rope.scaling,
        ntk_alpha=rope.ntk_alpha,
        yarn_factor=rope.yarn_factor,
        yarn_original_length=rope.yarn_original_length,
        yarn_beta_fast=rope.yarn_beta_fast,
        yarn_beta_slow=rope.yarn_beta_slow,
        yarn_truncate=rope.yarn_truncate,
        llama3=llama3_numbers(rope.llama3),
        linear_factor=rope.linear_factor,
    )


def llama3_numbers(section: Llama3Stretch | None) -> Llama3Numbers | None:
    """The section as the kernels take it."""
    if section is None:
        return None
    return Llama3Numbers(section.factor, section.original_length, section.slow_turns, section.fast_turns)


def attend(
    q_BTHK: Tensor,
    k_BSJK: Tensor,
    v_BSJK: Tensor,
    meta: PackMeta,
    groups: ProcessGroupCollection,
    *,
    scale: float | None,
    backend: str,
    sinks_H: Tensor | None = None,
    highest_H: Tensor | None = None,
) -> Tensor:
    """Attend q [B, T, H, K] to the keys of whole rows, k and v [B, S, J, K] -> [B, T, H, K].

    Of rows that are cut over context ranks, k and v are this rank's, and all ranks of `groups.cp` must call.
    """
    if meta.segments is not None:
        return _attend_segments(q_BTHK, k_BSJK, v_BSJK, meta, meta.segments, groups, scale, backend, sinks_H, highest_H)
    return _attend(q_BTHK, k_BSJK, v_BSJK, meta.boundaries_BT(), scale, backend, sinks_H, highest_H, meta.document_ends)


def _attend_segments(
    q_BTHK: Tensor,
    k_BTJK: Tensor,
    v_BTJK: Tensor,
    meta: PackMeta,
    segments: Segments,
    groups: ProcessGroupCollection,
    scale: float | None,
    backend: str,
    sinks_H: Tensor | None,
    highest_H: Tensor | None,
) -> Tensor:
    """Queries of this rank's segments to the keys of whole rows, which all context ranks gather: few heads, once."""
    k_BSJK, v_BSJK = gather_rows(torch.stack([k_BTJK, v_BTJK]), segments, groups).unbind()
    outputs = []
    every_ends = segments.document_ends or (None, None)
    for number, ends, q_BLHK in zip(segments.own, every_ends, q_BTHK.chunk(2, dim=1)):
        # Keys up to the segment's own end: causal attention aligns the last query with the last key.
        seen = (number + 1) * segments.length
        ids_BS = None if meta.single_document else segments.document_ids_BT[:, :seen]
        outputs.append(
            _attend(q_BLHK, k_BSJK[:, :seen], v_BSJK[:, :seen], ids_BS, scale, backend, sinks_H, highest_H, ends)
        )
    return torch.cat(outputs, dim=1)


def _attend(
    q_BTHK: Tensor,
    k_BSJK: Tensor,
    v_BSJK: Tensor,
    ids_BS: Tensor | None,
    scale: float | None,
    backend: str,
    sinks_H: Tensor | None,
    highest_H: Tensor | None,
    ends: DocumentEnds | None = None,
) -> Tensor:
    """Attend q [B, T, H, K] to k, v [B, S, J, K] -> [B, T, H, K], by whatever is fastest for them on this device."""
    has_documents = ids_BS is not None
    backend = fastest_backend(
        backend,
        q_BTHK,
        has_documents=has_documents,
        keys=k_BSJK.shape[1],
        document_ends=ends,
        has_sinks=sinks_H is not None,
        gives_sums=highest_H is not None,
    )
    return attention(
        q_BTHK,
        k_BSJK,
        v_BSJK,
        sinks_H=sinks_H,
        document_ids_BS=ids_BS,
        scale=scale,
        document_ends=ends,
        highest_H=highest_H,
        backend=backend,
    )


def make_sinks(num_heads: int, groups: ProcessGroupCollection, name: str) -> tuple[nn.Parameter, dict[str, Shard]]:
    """Make the sinks [H of this rank] of an attention, zeros, and say how they are cut; name: the setting of the heads."""
    sinks = nn.Parameter(torch.zeros(divide(num_heads, groups, name)))
    return sinks, {"sinks": Shard((ShardSpec(0, "tp", (num_heads,)),))}
