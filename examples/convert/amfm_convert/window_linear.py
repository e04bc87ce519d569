"""Softmax attention over a window and linear attention over older tokens: what a conversion puts in softmax attention's place.

It keeps the weights of softmax attention (q, k, v, o, under the same names), and with a window as long as the row it
computes the same. What is before the window costs a state of fixed size. With s the scaled scores of the window, m the
largest of them, and l = phi(q_i) phi(k_j) e^(g_(j+1) + ... + g_i) for older tokens of the same document:

    joint      o = (a sum e^(s - m) v + sum l v) / (a sum e^(s - m) + sum l), a = sigmoid of one number per head
    average    o = (1 - c) softmax(s) v + c sum l v, with l over all tokens and no denominator

`joint` with hedgehog features is LoLCATs (Zhang et al. 2024, arXiv 2410.10254), `average` with decays made of the keys
Liger (Lan et al. 2025, arXiv 2503.01496). `joint` with a learned decay a feature and a few meta tokens is Lizard (Nguyen et
al. 2025, arXiv 2507.09025) as far as its abstract says; the default has one decay a head and no such tokens. The chunked
scan is Lizard's hardware-aware form: decays join the features, with exponents that stay below zero. docs/conversion.md has
what they gave.

While a conversion trains the features (`transfer_scale`), the mixer hands on what softmax attention gives and its own
output's distance from it as the loss `transfer`: each block then learns from the teacher's stream, apart from all others.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from amfm.kernels.rope.op import qk_norm_rope, rope_frequencies
from amfm.model.mixers.attention import attend, llama3_numbers
from amfm.model.mixers.interface import BlockState, BuildContext, MixerOutput, MixerState, SequenceMixer
from amfm.model.mixers.recurrence import ScanRows, ScanSettings, add_initial_state, delay_rows
from amfm.model.mixers.shared_layers import HeadNorm, gate_heads, gate_projection
from amfm.model.packing import PackMeta
from amfm.model.parallel.context import receive_states, receive_windows
from amfm.model.parallel.layers import ColumnLinear, RowLinear, project_layers
from amfm.model.parallel.regions import leave_tensor_region, sum_values
from amfm.model.parallel.shards import Shard, ShardSpec, divide, divide_units
from amfm.model.segments import Segments
from amfm_convert.branches import Past, Rows, SharedReads, WindowSums, window_sums
from amfm_convert.spec import WindowLinearOptions

# sigmoid of it is 0.1: the window's first weight next to features that sum to one.
FIRST_WINDOW_WEIGHT = math.log(0.1 / 0.9)
# logsigmoid(4) = -0.018 forgets half in 38 tokens.
DECAY_BIAS = 4.0
KEY_DECAY_DIVISOR = 16.0


class WindowLinearMixer(SequenceMixer):
    """Softmax over a window, linear attention over what has left it; heads are cut over the tensor ranks.

    The decode state has the keys of the window and one matrix a key head. Context ranks get the window before their
    segments from their neighbours, and the state that enters them as every linear mixer. Only for measurements and
    conversions: `transfer_scale` (see above), `used`, the branches that the output is made of, and `measured`, to which the sum of
    the linear branch's share of the mass, over tokens at least two windows into their document, and their number are added.
    """

    window_weight: Tensor
    meta_keys: Tensor
    meta_values: Tensor

    def __init__(self, options: WindowLinearOptions, build: BuildContext) -> None:
        super().__init__()
        self.options, self.build, self.form = options, build, options.branches()
        groups, hidden, size, kv_heads = build.groups, build.hidden_size, options.head_dim, options.kv_heads()
        name, kv_name = "model.mixers.window_linear.num_heads", "model.mixers.window_linear.num_kv_heads"
        self.num_heads = divide(options.num_heads, groups, name)
        self.num_kv_heads = divide_units(kv_heads, groups, kv_name)
        self.scale = options.softmax_scale or size**-0.5
        self.kept = options.kept_tokens()
        self.q_proj = ColumnLinear(hidden, (options.num_heads * size,), groups, name=name)
        self.k_proj = ColumnLinear(hidden, (kv_heads * size,), groups, name=kv_name, units=(kv_heads,))
        self.v_proj = ColumnLinear(hidden, (kv_heads * size,), groups, name=kv_name, units=(kv_heads,))
        self.o_proj = RowLinear(options.num_heads * size, hidden, groups, name=name)
        self.g_proj = gate_projection(options.output_gate, hidden, options.num_heads, size, groups, name=name)
        self.q_norm = HeadNorm(size) if options.qk_norm else None
        self.k_norm = HeadNorm(size) if options.qk_norm else None
        self.decay_proj: ColumnLinear | None = None
        if self.form.gate in ("learned", "channel"):
            decays = kv_heads * (options.num_features() if self.form.gate == "channel" else 1)
            self.decay_proj = ColumnLinear(hidden, (decays,), groups, name=kv_name, units=(kv_heads,))
        self.shards: dict[str, Shard] = {}
        by_head = Shard((ShardSpec(0, "tp", (options.num_heads,)),))
        by_key_head = Shard((ShardSpec(0, "tp", (kv_heads,), (kv_heads,)),))
        if self.form.features == "hedgehog":
            rows = options.feature_size or size
            self._add("query_features", (self.num_heads, rows, size), by_head)
            self._add("key_features", (self.num_kv_heads, rows, size), by_key_head)
        if self.form.combine == "joint":
            self._add("window_weight", (self.num_heads,), by_head)
        if options.meta_tokens:
            for which in ("meta_keys", "meta_values"):
                self._add(which, (self.num_kv_heads, options.meta_tokens, size), by_key_head)
        self.recurrence = SharedReads()
        self.transfer_scale: float | None = None
        self.used: Literal["both", "window", "linear"] = "both"
        self.measured: Tensor | None = None
        self.inverse_frequencies: Tensor | None
        self.register_buffer("inverse_frequencies", None, persistent=False)

    def _add(self, name: str, shape: tuple[int, ...], shard: Shard) -> None:
        self.register_parameter(name, nn.Parameter(torch.empty(shape)))
        self.shards[name] = shard

    def reset_buffers(self) -> None:
        """Compute the rotary frequencies, on the device of the weights."""
        options = self.options
        if options.positions == "rope":
            found, _ = rope_frequencies(
                options.head_dim,
                theta=options.rope_theta,
                fraction=options.rope_fraction,
                scaling="none" if options.rope_llama3 is None else "llama3",
                llama3=llama3_numbers(options.rope_llama3),
            )
            self.inverse_frequencies = found.to(self.o_proj.weight.device)

    def init_parameter(self, name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor | None:
        """Features of queries and keys themselves where W is square, else Kaiming's; a window of weight 0.1."""
        if name in ("query_features", "key_features"):
            if shape[1] == shape[2]:
                return torch.eye(shape[-1]).expand(shape).clone()
            bound = shape[-1] ** -0.5
            return torch.empty(shape).uniform_(-bound, bound, generator=generator)
        return torch.full(shape, FIRST_WINDOW_WEIGHT) if name == "window_weight" else None

    def forward(self, x_BTD: Tensor, meta: PackMeta, state: BlockState = None) -> MixerOutput:
        """Mix x [B, T, D] -> y [B, T, D]; with a state the tokens continue from there, and the next state is
        returned.
        """
        is_transfer = self.training and self.transfer_scale is not None
        # Blocks learn apart: what comes in is the teacher's stream, and no gradient goes back into it.
        rows, gate_BTX = self._project(x_BTD.detach() if is_transfer else x_BTD, meta)
        following: MixerState | None = None
        if meta.segments is not None:
            assert state is None, "rows that are cut over context ranks have no decode state"
            o_BTHV = self._mix_segments(rows, meta, meta.segments)
        elif state is not None:
            assert isinstance(state, dict), f"a registered mixer got a {type(state).__name__}"
            o_BTHV, following = self._go_on(rows, meta, state)
        else:
            o_BTHV, _ = self._mix(
                rows, self._nothing_before(rows), meta.document_ids_BT, self._settings(meta), meta, None
            )
        auxiliary: dict[str, Tensor] = {}
        if is_transfer:
            taught_BTHV = attend(
                rows.q, rows.k, rows.v, meta, self.build.groups, scale=self.scale, backend=self.build.backend
            )
            auxiliary, o_BTHV = {"transfer": self._distance(o_BTHV, taught_BTHV)}, taught_BTHV
        if gate_BTX is not None:
            o_BTHV = gate_heads(o_BTHV, gate_BTX)
        return MixerOutput(
            leave_tensor_region(self.o_proj(o_BTHV.flatten(-2)), self.build.groups), following, auxiliary
        )

    def _project(self, x_BTD: Tensor, meta: PackMeta) -> tuple[Rows, Tensor | None]:
        """Project the residual stream to what mixing reads, and to the gate of the output, if there is one."""
        layers = [self.q_proj, self.k_proj, self.v_proj]
        layers += [layer for layer in (self.decay_proj, self.g_proj) if layer is not None]
        q_BTX, k_BTX, v_BTX, *others = project_layers(x_BTD, layers, self.build.groups)
        size = self.options.head_dim
        q_BTHK, k_BTJK, v_BTJK = (x.unflatten(-1, (-1, size)) for x in (q_BTX, k_BTX, v_BTX))
        if self.q_norm is not None:
            q_BTHK, k_BTJK = self._norm_rotate(q_BTHK, k_BTJK, meta, norms=True)
        plain_q, plain_k = q_BTHK, k_BTJK
        if self.inverse_frequencies is not None:
            q_BTHK, k_BTJK = self._norm_rotate(q_BTHK, k_BTJK, meta, norms=False)
        is_rotated = self.form.linear_positions == "rotary"
        wide = torch.promote_types(k_BTJK.dtype, torch.float32)
        decay: Tensor | None = None
        if self.decay_proj is not None:
            decay = functional.logsigmoid(others.pop(0).to(wide) + DECAY_BIAS)
            if self.form.gate == "channel":
                decay = decay.unflatten(-1, (self.num_kv_heads, -1))
        elif self.form.gate == "key":
            decay = functional.logsigmoid(plain_k.to(wide)) / KEY_DECAY_DIVISOR
        rows = Rows(
            q_BTHK,
            self._features(q_BTHK if is_rotated else plain_q, "query_features"),
            k_BTJK,
            v_BTJK,
            self._features(k_BTJK if is_rotated else plain_k, "key_features"),
            decay,
        )
        return rows, others[0] if others else None

    def _norm_rotate(self, q_BTHK: Tensor, k_BTJK: Tensor, meta: PackMeta, *, norms: bool) -> tuple[Tensor, Tensor]:
        """Norm each head, or rotate it: features may see heads that are normed and not rotated."""
        return qk_norm_rope(
            q_BTHK,
            k_BTJK,
            meta.positions_BT,
            None if norms else self.inverse_frequencies,
            1.0,
            q_weight_K=self.q_norm.weight if norms and self.q_norm is not None else None,
            k_weight_K=self.k_norm.weight if norms and self.k_norm is not None else None,
            epsilon=self.build.norm_epsilon,
            backend=self.build.backend,
        )

    def _features(self, x_BTHK: Tensor, name: str) -> Tensor:
        """Map heads [B, T, H, K] to positive features [B, T, H, F]; softmax in float32 for bf16."""
        if self.form.features == "hedgehog":
            x_BTHK = torch.einsum("bthk,hjk->bthj", x_BTHK, getattr(self, name))
        wide = x_BTHK.to(torch.promote_types(x_BTHK.dtype, torch.float32))
        if self.form.features == "softmax":
            return wide.softmax(-1).to(x_BTHK.dtype)
        return torch.cat([wide.softmax(-1), (-wide).softmax(-1)], dim=-1).to(x_BTHK.dtype)

    def _settings(self, meta: PackMeta | None) -> ScanSettings:
        ids_BT = None if meta is None else meta.boundaries_BT()
        return ScanSettings(ids_BT, self.options.chunk_size, self.build.backend)

    def _nothing_before(self, rows: Rows) -> Past:
        """Zeros for the tokens before rows that begin their documents."""

        def zeros(x: Tensor) -> Tensor:
            return x.new_zeros(len(x), self.kept, *x.shape[2:])

        ids = torch.full((len(rows.k), self.kept), -1, dtype=torch.int32, device=rows.k.device)
        decay = None if rows.decay is None else zeros(rows.decay)
        return Past(zeros(rows.k), zeros(rows.v), zeros(rows.key_features), decay, ids)

    def _mix(
        self,
        rows: Rows,
        past: Past,
        ids_BT: Tensor,
        how: ScanSettings,
        meta: PackMeta,
        state: Tensor | None,
        *,
        segments: Segments | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Mix rows after the tokens before them: outputs [B, T, H, V], and the state of the recurrence after them."""
        seen_BS = torch.cat([past.ids.to(ids_BT.dtype), ids_BT], dim=1)
        k, v, features = (
            torch.cat([before, own], dim=1)
            for before, own in ((past.k, rows.k), (past.v, rows.v), (past.key_features, rows.key_features))
        )
        sums = window_sums(
            rows.q, k, v, window=self.options.window, document_ids_BS=seen_BS, scale=self.scale, backend=how.backend
        )
        if self.options.meta_tokens:
            sums = self._join_meta(rows.q, sums)
        if self.form.combine == "average":
            decay = rows.decay
            if decay is None:
                decay = rows.key_features.new_zeros(rows.key_features.shape[:3], dtype=sums.mass_BTH.dtype)
            scanned = ScanRows(rows.query_features, rows.key_features, rows.v, decay)
        else:
            decay = None if rows.decay is None or past.decay is None else torch.cat([past.decay, rows.decay], dim=1)
            # Ones next to the values sum the weights.
            late = ScanRows(rows.query_features, features, functional.pad(v, (0, 1), value=1.0), decay)
            scanned = delay_rows(late, self.options.window, seen_BS)
        linear_BTHV, following = self._scan(scanned, how, state, segments)
        return self._combine(sums, linear_BTHV, meta.positions_BT), following

    def _scan(
        self, rows: ScanRows, how: ScanSettings, state: Tensor | None, segments: Segments | None
    ) -> tuple[Tensor, Tensor]:
        """Run the recurrence over rows, on from a state, or over segments, whose entering states arrive afterwards."""
        if segments is not None:
            scan = self.recurrence.scan_with_transfer(rows, how)
            entering = receive_states(
                scan.final_BHKV.unflatten(0, (-1, 2)), scan.transfer.unflatten(0, (-1, 2)), segments, self.build.groups
            )
            return add_initial_state(scan, entering.flatten(0, 1)), scan.final_BHKV
        if state is not None and rows.q.shape[1] == 1:
            token = ScanRows(*(None if x is None else x[:, 0] for x in rows))  # type: ignore[arg-type]
            o_BHV, following = self.recurrence.step(token, state)
            return o_BHV[:, None], following
        return self.recurrence.scan(rows, how, state)

    def _join_meta(self, q_BTHK: Tensor, sums: WindowSums) -> WindowSums:
        """Let every window see the meta tokens besides."""
        q_BTJRK = q_BTHK.unflatten(2, (self.num_kv_heads, -1))
        scores = torch.einsum("btjrk,jnk->btjrn", q_BTJRK, self.meta_keys).flatten(2, 3)
        scores = scores.to(sums.mass_BTH.dtype) * self.scale
        highest = torch.maximum(sums.highest_BTH, scores.amax(-1))
        weights = (scores - highest[..., None]).exp()
        own = sums.mass_BTH * (sums.highest_BTH - highest).exp()
        mass = own + weights.sum(-1)
        values = torch.einsum(
            "btjrn,jnv->btjrv", weights.to(q_BTHK.dtype).unflatten(2, (self.num_kv_heads, -1)), self.meta_values
        ).flatten(2, 3)
        o_BTHV = (own[..., None] * sums.o_BTHV + values) / mass[..., None]
        return WindowSums(o_BTHV.to(q_BTHK.dtype), highest, mass)

    def _combine(self, sums: WindowSums, linear_BTHV: Tensor, positions_BT: Tensor) -> Tensor:
        """Make the output of both branches [B, T, H, V], in the dtype of the window's."""
        wide, dtype = sums.mass_BTH.dtype, sums.o_BTHV.dtype
        window_BTHV, linear_BTHV = sums.o_BTHV.to(wide), linear_BTHV.to(wide)
        if self.form.combine == "average":
            share = self.options.linear_weight
            window_BTHV, linear_BTHV = (1 - share) * window_BTHV, share * linear_BTHV
            if self.measured is not None:
                lengths = [x.norm(dim=-1) for x in (linear_BTHV, window_BTHV)]
                self._measure(lengths[0] / (lengths[0] + lengths[1]), positions_BT)
            parts = {"window": window_BTHV, "linear": linear_BTHV, "both": window_BTHV + linear_BTHV}
            return parts[self.used].to(dtype)
        values_BTHV, weight_BTH = linear_BTHV[..., :-1], linear_BTHV[..., -1]
        mass_BTH = self.window_weight.to(wide).sigmoid() * sums.mass_BTH
        if self.measured is not None:
            self._measure(weight_BTH / (mass_BTH + weight_BTH), positions_BT)
        if self.used == "window":
            return sums.o_BTHV
        if self.used == "linear":
            # Before any token has left the window there is nothing.
            return torch.where(weight_BTH[..., None] > 0, values_BTHV / weight_BTH[..., None], 0.0).to(dtype)
        return ((mass_BTH[..., None] * window_BTHV + values_BTHV) / (mass_BTH + weight_BTH)[..., None]).to(dtype)

    def _measure(self, share_BTH: Tensor, positions_BT: Tensor) -> None:
        """Add the shares of tokens two windows into their document, and their number."""
        assert self.measured is not None
        is_late_BT = positions_BT.reshape(share_BTH.shape[:2]) >= 2 * self.options.window
        total = torch.where(is_late_BT[..., None], share_BTH, 0.0).sum(dtype=torch.float64)
        self.measured += torch.stack([total, is_late_BT.sum().double() * share_BTH.shape[2]]).to(self.measured)

    def _distance(self, o_BTHV: Tensor, taught_BTHV: Tensor) -> Tensor:
        """Scaled mean squared distance from the teacher's output, of all heads and, summed over context ranks, tokens."""
        assert self.transfer_scale is not None
        wide = torch.promote_types(o_BTHV.dtype, torch.float32)
        groups = self.build.groups
        numbers = o_BTHV.numel() * groups.tp.size() * groups.cp.size()
        own = (o_BTHV.to(wide) - taught_BTHV.detach().to(wide)).square().sum() * (self.transfer_scale / numbers)
        return sum_values(own, groups)

    def _go_on(self, rows: Rows, meta: PackMeta, state: MixerState) -> tuple[Tensor, MixerState]:
        """Mix the tokens after those of a decode state, and return the next one; the old one stays valid."""
        kept = self.kept
        # Slots of the state that no token has filled yet are another document.
        slot_W = torch.arange(-kept, 0, device=rows.k.device)
        ids_BW = torch.where(slot_W < -meta.positions_BT[:, :1], -1, 0)
        past = Past(state["k"], state["v"], state.get("features", rows.key_features[:, :0]), state.get("decay"), ids_BW)
        ids_BT = torch.zeros_like(meta.positions_BT)
        o_BTHV, following = self._mix(rows, past, ids_BT, self._settings(None), meta, state["state"])
        named = {"k": rows.k, "v": rows.v, "features": rows.key_features, "decay": rows.decay}
        next_state = {
            name: torch.cat([state[name].to(own.dtype), own], dim=1)[:, own.shape[1] :]
            for name, own in named.items()
            if name in state and own is not None
        }
        return o_BTHV, next_state | {"state": following}

    def _mix_segments(self, rows: Rows, meta: PackMeta, segments: Segments) -> Tensor:
        """Mix each of this rank's segments as a row, after what its neighbours send of the tokens before it.

        Exchanges over `groups.cp`: windows with the neighbours before the scan, states with all after it.
        """
        groups = self.build.groups
        own = Rows(*(None if x is None else segments.as_rows(x) for x in rows))  # type: ignore[arg-type]
        together = [own.k, own.v, own.key_features]
        before = receive_windows(torch.cat([x.flatten(2) for x in together], dim=2), self.kept, segments, groups)
        k, v, features = (
            part.unflatten(2, x.shape[2:])
            for part, x in zip(before.split([x[0, 0].numel() for x in together], dim=2), together)
        )
        decay = None
        if own.decay is not None:
            decay = receive_windows(own.decay.flatten(2), self.kept, segments, groups).unflatten(2, own.decay.shape[2:])
        ids_RL = segments.as_rows(meta.document_ids_BT)
        # What the mask hides is in another document, or before the row.
        ids_RW = torch.where(segments.window_mask(self.kept).flatten(0, 1), ids_RL[:, :1], -1)
        how = self._settings(meta)._replace(document_ids_BT=None if meta.single_document else ids_RL)
        past = Past(k, v, features, decay, ids_RW)
        o_RLHV, _ = self._mix(own, past, ids_RL, how, meta, None, segments=segments)
        return o_RLHV.reshape(*rows.q.shape[:2], *o_RLHV.shape[2:])

    def empty_state(self, num_rows: int) -> MixerState:
        """Build slots for the tokens of the window, zeros until tokens fill them, and the zero state of the recurrence."""
        weight, kv_heads, size = self.o_proj.weight, self.num_kv_heads, self.options.head_dim
        slots = weight.new_zeros(num_rows, self.kept, kv_heads, size)
        state_shape = (num_rows, kv_heads, *self.options.state_shape())
        state = {"k": slots, "v": slots, "state": torch.zeros(state_shape, device=weight.device)}
        if self.form.combine == "joint":
            state["features"] = weight.new_zeros(num_rows, self.kept, kv_heads, self.options.num_features())
            if self.form.gate != "none":
                decays = [self.options.num_features()] if self.options.fades_by_channel() else []
                state["decay"] = torch.zeros(*slots.shape[:3], *decays, device=weight.device)
        return state

    def sequence_flops(self, sequence_length: int) -> float:
        """FLOPs per token of the window's two products and of the recurrence, read once by each query head."""
        window = min(self.options.window, sequence_length)
        keys = window - window * (window - 1) / (2 * sequence_length) + self.options.meta_tokens
        states, (features, columns) = self.num_kv_heads, self.options.state_shape()
        more_reads = 2.0 * (self.num_heads - states) * features * columns
        softmax = 4.0 * keys * self.num_heads * self.options.head_dim
        return softmax + self.recurrence.flops(states, features, columns) + more_reads
