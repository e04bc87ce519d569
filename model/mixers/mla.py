"""Multi-head latent attention: keys and values of all heads from one narrow vector a token.

A cache of keys and values grows with heads; here it holds one latent vector a token, from which each head expands its own.
Training expands, because products of expanded heads are cheaper for many queries; decoding folds the expansion into the query
and the output, because reading the cache is what one query costs. Rotation would stand between the two matrices and forbid
folding, so positions live in a separate part of the key that all heads share.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from amfm.kernels.attention.op import attention, fastest_backend
from amfm.kernels.attention.varlen import DocumentEnds
from amfm.kernels.linear.op import linear
from amfm.kernels.rope.op import qk_norm_rope
from amfm.kernels.sparse_attention.reference import IndexRows
from amfm.model.config.key_mixer_options import MlaOptions, keys_and_scores
from amfm.model.mixers.attention import frequencies_of, make_sinks
from amfm.model.mixers.interface import BlockState, BuildContext, MixerOutput, MixerState, SequenceMixer, SoftmaxMixer
from amfm.model.mixers.shared_layers import gate_heads, gate_projection
from amfm.model.mixers.sparse.indexer import NORM_BIAS, Indexer
from amfm.model.packing import PackMeta
from amfm.model.parallel.context import gather_rows
from amfm.model.parallel.layers import ColumnLinear, Linear, RMSNorm, RowLinear
from amfm.model.parallel.regions import enter_tensor_region, leave_tensor_region, project_stream
from amfm.model.parallel.shards import divide
from amfm.model.segments import Segments


class MlaMixer(SoftmaxMixer, SequenceMixer):
    """c = norm(W_down x), and one rotary key k_r for all heads; a head's keys [W_uk c; k_r] and values W_uv c.

    Sizes: r latent, N and R the two parts of a key, V a value. Training expands keys and values. The decode state has only c and
    k_r, r + R numbers per token, and decoding attends to them as they are: W_uk goes to the query, W_uv to the
    weighted sum of latents, the same function in another order. Tensor ranks have whole latents and their heads'
    matrices; context ranks gather latents, not heads. Source: DeepSeek-AI 2024, arXiv 2405.04434, section 2.1.
    """

    def __init__(self, options: MlaOptions, build: BuildContext) -> None:
        super().__init__()
        self.options, self.build = options, build
        groups, hidden, name = build.groups, build.hidden_size, "model.mixers.mla.num_heads"
        heads, latent = options.num_heads, options.latent_size
        self.num_heads = divide(heads, groups, name)
        self.key_size, self.scale = options.nope_head_dim + options.rope_head_dim, options.scale()
        self.kv_down = Linear(hidden, latent + options.rope_head_dim, groups)
        self.kv_norm = RMSNorm(latent, options.latent_norm_epsilon, build.backend, groups)
        values = heads * (options.nope_head_dim + options.value_head_dim)
        self.kv_up = ColumnLinear(latent, (values,), groups, name=name, units=(heads,))
        width = options.query_latent_size
        self.q_down = None if width is None else Linear(hidden, width, groups)
        self.q_norm = None if width is None else RMSNorm(width, options.latent_norm_epsilon, build.backend, groups)
        self.q_proj = ColumnLinear(width or hidden, (heads * self.key_size,), groups, name=name, units=(heads,))
        self.g_proj = gate_projection(options.gate, hidden, heads, options.value_head_dim, groups, name=name)
        self.out_proj = RowLinear(heads * options.value_head_dim, hidden, groups, name=name)
        self.sinks = None
        if options.sinks:
            self.sinks, self.shards = make_sinks(heads, groups, name)
        self.indexer = None if options.indexer is None else Indexer(options.indexer, width or hidden, build)
        self.attention_factor = 1.0
        self.inverse_frequencies: Tensor | None
        self.register_buffer("inverse_frequencies", None, persistent=False)

    @property
    def is_graphable(self) -> bool:
        """Where our kernels attend, as in attention."""
        return self.build.backend == "triton" and self.indexer is None

    def reset_buffers(self) -> None:
        """Compute the rotary frequencies, on the device of the weights."""
        if self.options.positions == "rope":
            rope, yarn, device = self.options.rope(), self.options.yarn, self.out_proj.weight.device
            frequencies, factor = frequencies_of(rope, self.options.rope_head_dim)
            self.inverse_frequencies = frequencies.to(device)
            self.attention_factor = factor if yarn is None or yarn.mscale is None else 1.0
            if self.indexer is not None:
                own = self.indexer.options
                frequencies, _ = frequencies_of(rope, own.head_dim, own.rope_fraction)
                self.indexer.inverse_frequencies = frequencies.to(device)
                self.indexer.attention_factor = self.attention_factor

    def forward(self, x_BTD: Tensor, meta: PackMeta, state: BlockState = None) -> MixerOutput:
        """Mix x [B, T, D] -> y [B, T, D]; with a state the tokens also see its latents; the longer state is returned."""
        query_BTX, q_BTHK, latent_BTX, gate_BTX = self._project(x_BTD, meta)
        following: MixerState | None = None
        auxiliary: dict[str, Tensor] | None = None
        index = None if self.indexer is None else self.indexer.sparse_rows(x_BTD, query_BTX, meta)
        if index is not None:
            o_BTHV, following, auxiliary = self._attend_chosen(index, q_BTHK, latent_BTX, meta, state)
        elif meta.segments is not None:
            assert state is None, "rows that are cut over context ranks have no decode state"
            o_BTHV = self._attend_segments(q_BTHK, latent_BTX, meta, meta.segments)
        elif state is None:
            o_BTHV = self._attend(q_BTHK, *self._expand(latent_BTX), meta.boundaries_BT(), meta.document_ends)
        else:
            assert isinstance(state, dict), f"a registered mixer got a {type(state).__name__}"
            latent_BSX = torch.cat([state["latent"], latent_BTX], dim=1)
            following = {"latent": latent_BSX}
            if state["latent"].shape[1]:
                o_BTHV = self._attend_latents(q_BTHK, latent_BSX)
            else:
                o_BTHV = self._attend(q_BTHK, *self._expand(latent_BSX), None)
        if self.indexer is not None and index is None and self.training:
            q_BTHX, k_BT1X = self._fold(q_BTHK.detach()), latent_BTX.unsqueeze(2)
            auxiliary = self.indexer.loss(x_BTD, query_BTX, q_BTHX, k_BT1X, meta, scale=self.scale)
        if gate_BTX is not None:
            o_BTHV = gate_heads(o_BTHV, gate_BTX)
        y_BTD = leave_tensor_region(self.out_proj(o_BTHV.flatten(-2)), self.build.groups)
        return MixerOutput(y_BTD, following, auxiliary)

    def _project(self, x_BTD: Tensor, meta: PackMeta) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Project to what queries are made of, queries [B, T, H, N + R], latents [B, T, r + R] of all tokens, and gates; rotary
        parts rotated.
        """
        query_BTX, groups, options = x_BTD, self.build.groups, self.options
        gates = [] if self.g_proj is None else [self.g_proj.weight]
        if self.q_down is None or self.q_norm is None:
            q_BTX, *gate_BTX = project_stream(x_BTD, [self.q_proj.weight, *gates], groups)
        else:
            query_BTX = self.q_norm(self.q_down(x_BTD))
            (q_BTX,) = project_stream(query_BTX, [self.q_proj.weight], groups)
            gate_BTX = list(project_stream(x_BTD, gates, groups)) if gates else []
        c_BTr, key_BTR = self.kv_down(x_BTD).split([options.latent_size, options.rope_head_dim], dim=-1)
        latent_BTX = enter_tensor_region(torch.cat([self.kv_norm(c_BTr.contiguous()), key_BTR], dim=-1), groups)
        q_BTHK = q_BTX.unflatten(-1, (self.num_heads, self.key_size))
        if self.inverse_frequencies is not None:
            plain_BTHN, turned_BTHR = q_BTHK.split([options.nope_head_dim, options.rope_head_dim], dim=-1)
            c_BTr, key_BTR = latent_BTX.split([options.latent_size, options.rope_head_dim], dim=-1)
            turned_BTHR, key_BT1R = qk_norm_rope(
                turned_BTHR.contiguous(),
                key_BTR.unsqueeze(2).contiguous(),
                meta.positions_BT,
                self.inverse_frequencies,
                self.attention_factor,
                backend=self.build.backend,
            )
            q_BTHK = torch.cat([plain_BTHN, turned_BTHR], dim=-1)
            latent_BTX = torch.cat([c_BTr, key_BT1R.squeeze(2)], dim=-1)
        return query_BTX, q_BTHK, latent_BTX, gate_BTX[0] if gate_BTX else None

    def _expand(self, latent_BSX: Tensor) -> tuple[Tensor, Tensor]:
        """Expand latents [B, S, r + R] to keys [B, S, H, N + R] and values [B, S, H, V] of this rank's heads."""
        options = self.options
        c_BSr, key_BSR = latent_BSX.split([options.latent_size, options.rope_head_dim], dim=-1)
        up_BSHX = linear(c_BSr, self.kv_up.weight).unflatten(-1, (self.num_heads, -1))
        k_BSHN, v_BSHV = up_BSHX.split([options.nope_head_dim, options.value_head_dim], dim=-1)
        return torch.cat([k_BSHN, key_BSR.unsqueeze(2).expand(-1, -1, self.num_heads, -1)], dim=-1), v_BSHV

    def _attend(
        self, q_BTHK: Tensor, k_BSHK: Tensor, v_BSHV: Tensor, ids_BS: Tensor | None, ends: DocumentEnds | None = None
    ) -> Tensor:
        """Attend with heads whose keys and values differ in width, [B, T, H, V], by the fastest backend for them."""
        has_documents, keys, highest_H = ids_BS is not None, k_BSHK.shape[1], self.noted_logits()
        backend = fastest_backend(
            self.build.backend,
            q_BTHK,
            has_documents=has_documents,
            keys=keys,
            document_ends=ends,
            has_sinks=self.sinks is not None,
            gives_sums=highest_H is not None,
        )
        return _attend_padded(q_BTHK, k_BSHK, v_BSHV, ids_BS, self.scale, backend, self.sinks, ends, highest_H)

    def _attend_latents(self, q_BTHK: Tensor, latent_BSX: Tensor) -> Tensor:
        """Attend within one document without expanding: all heads read the latents as one key and value head."""
        latent_BS1X = latent_BSX.unsqueeze(2)
        # Our Triton kernel has no heads of this width, and one query needs none.
        backend = "torch" if self.build.backend == "triton" else self.build.backend
        c_BS1r = latent_BS1X[..., : self.options.latent_size]
        q_BTHX = self._fold(q_BTHK)
        return self._unfold(_attend_padded(q_BTHX, latent_BS1X, c_BS1r, None, self.scale, backend, self.sinks))

    def _fold(self, q_BTHK: Tensor) -> Tensor:
        """Queries of latents, [B, T, H, r + R]: the expansion of keys goes to the query."""
        options = self.options
        of_keys_HNr = self.kv_up.weight.unflatten(0, (self.num_heads, -1))[:, : options.nope_head_dim]
        plain_BTHN, turned_BTHR = q_BTHK.split([options.nope_head_dim, options.rope_head_dim], dim=-1)
        return torch.cat([torch.einsum("bthn,hnr->bthr", plain_BTHN, of_keys_HNr), turned_BTHR], dim=-1)

    def _unfold(self, o_BTHr: Tensor) -> Tensor:
        """Values [B, T, H, V] of weighted sums of latents."""
        of_values_HVr = self.kv_up.weight.unflatten(0, (self.num_heads, -1))[:, self.options.nope_head_dim :]
        return torch.einsum("bthr,hvr->bthv", o_BTHr, of_values_HVr)

    def _attend_chosen(
        self, index: IndexRows, q_BTHK: Tensor, latent_BTX: Tensor, meta: PackMeta, state: BlockState
    ) -> tuple[Tensor, MixerState | None, dict[str, Tensor]]:
        """Attend to the latents that the indexer chooses, without expanding any; with the longer state, and the loss."""
        assert self.indexer is not None, "it made the index"
        following: MixerState | None = None
        if meta.segments is not None:
            assert state is None, "rows that are cut over context ranks have no decode state"
            (latent_BTX,) = gather_rows(latent_BTX.unsqueeze(0), meta.segments, self.build.groups)
        elif state is not None:
            assert isinstance(state, dict), f"a registered mixer got a {type(state).__name__}"
            latent_BTX, index = torch.cat([state["latent"], latent_BTX], dim=1), index.after(state["index_k"])
            following = {"latent": latent_BTX, "index_k": index.k_BSC}
        o_BTHr, auxiliary = self.indexer.attend(
            index,
            self._fold(q_BTHK),
            latent_BTX.unsqueeze(2),
            self.options.latent_size,
            meta,
            scale=self.scale,
            highest_H=self.noted_logits(),
        )
        return self._unfold(o_BTHr), following, auxiliary

    def _attend_segments(self, q_BTHK: Tensor, latent_BTX: Tensor, meta: PackMeta, segments: Segments) -> Tensor:
        """Attend from this rank's segments to the keys of whole rows, of which context ranks gather the latents."""
        (latent_BSX,) = gather_rows(latent_BTX.unsqueeze(0), segments, self.build.groups)
        k_BSHK, v_BSHV = self._expand(latent_BSX)
        outputs = []
        every_ends = segments.document_ends or (None, None)
        for number, ends, q_BLHK in zip(segments.own, every_ends, q_BTHK.chunk(2, dim=1)):
            seen = (number + 1) * segments.length
            ids_BS = None if meta.single_document else segments.document_ids_BT[:, :seen]
            outputs.append(self._attend(q_BLHK, k_BSHK[:, :seen], v_BSHV[:, :seen], ids_BS, ends))
        return torch.cat(outputs, dim=1)

    def scale_logits(self, factors_H: Tensor) -> dict[nn.Parameter, Tensor]:
        """Half (the root) to a head's queries and keys without position; all of it to its rotated queries, whose key all share."""
        options, roots_H = self.options, factors_H.sqrt()
        sizes = (options.nope_head_dim, options.rope_head_dim, options.value_head_dim)
        plain, turned, values = (
            x_H[:, None].expand(-1, size) for x_H, size in zip((roots_H, factors_H, torch.ones_like(roots_H)), sizes)
        )
        return {
            self.q_proj.weight: torch.cat([plain, turned], dim=1).flatten(),
            self.kv_up.weight: torch.cat([plain, values], dim=1).flatten(),
        }

    def init_parameter(self, name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor | None:
        """Sinks begin at 0."""
        return torch.zeros(shape) if name in ("sinks", NORM_BIAS) else None

    def empty_state(self, num_rows: int) -> MixerState:
        """Build the state before the first token: no latents, [B, 0, r + R], and no keys of an indexer that chooses."""
        width = self.options.latent_size + self.options.rope_head_dim
        state = {"latent": self.out_proj.weight.new_zeros(num_rows, 0, width)}
        index_k_BSC = None if self.indexer is None else self.indexer.no_keys(num_rows)
        return state if index_k_BSC is None else state | {"index_k": index_k_BSC}

    def sequence_flops(self, sequence_length: int) -> float:
        """FLOPs per token of queries times the keys that it reads on average, and of weights times values; an indexer's scores.

        Chosen keys and values are latents.
        """
        options = self.options
        keys, scores = keys_and_scores(options.indexer, sequence_length)
        sizes = self.key_size + options.value_head_dim
        if options.indexer is not None and options.indexer.stage == "sparse":
            sizes = 2 * options.latent_size + options.rope_head_dim
        return 2.0 * keys * self.num_heads * sizes + scores


def _attend_padded(
    q_BTHK: Tensor,
    k_BSJK: Tensor,
    v_BSJV: Tensor,
    ids_BS: Tensor | None,
    scale: float,
    backend: str,
    sinks_H: Tensor | None,
    ends: DocumentEnds | None = None,
    highest_H: Tensor | None = None,
) -> Tensor:
    """Attend with kernels that take heads of one width: zeros fill up the narrower ones, which changes no product."""
    value_size = v_BSJV.shape[-1]
    width = max(k_BSJK.shape[-1], value_size)
    # A padding of no channels would copy.
    q, k, v = (
        x if x.shape[-1] == width else functional.pad(x, (0, width - x.shape[-1])) for x in (q_BTHK, k_BSJK, v_BSJV)
    )
    y = attention(
        q,
        k,
        v,
        sinks_H=sinks_H,
        document_ids_BS=ids_BS,
        scale=scale,
        document_ends=ends,
        highest_H=highest_H,
        backend=backend,
    )
    return y[..., :value_size]
