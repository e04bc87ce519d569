"""Attention over the last few tokens.

It gives a hybrid exact recall of what is near at a cost and a state that do not grow with the row, and leaves what is far to
the recurrences. Context ranks need only the window before each segment, from neighbours, where full attention gathers whole
rows.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from amfm.kernels.attention.op import attention
from amfm.kernels.rope.op import qk_norm_rope
from amfm.model.config.key_mixer_options import WindowOptions
from amfm.model.mixers.attention import frequencies_of, make_sinks
from amfm.model.mixers.interface import BlockState, BuildContext, MixerOutput, MixerState, SequenceMixer, SoftmaxMixer
from amfm.model.mixers.shared_layers import HeadNorm, WideNorm, gate_heads, gate_projection, query_norm
from amfm.model.packing import PackMeta
from amfm.model.parallel.context import receive_windows
from amfm.model.parallel.layers import ColumnLinear, RowLinear, project_layers
from amfm.model.parallel.shards import divide, divide_units
from amfm.model.segments import Segments


class WindowMixer(SoftmaxMixer, SequenceMixer):
    """Causal grouped-query attention to the last `window` tokens of the document, the token itself among them.

    The decode state has the keys and values of window - 1 tokens, whatever the text's length. Context ranks get those
    before their segments from their neighbours.
    Source: Beltagy et al. 2020, arXiv 2004.05150, section 3.1.
    """

    def __init__(self, options: WindowOptions, build: BuildContext) -> None:
        super().__init__()
        self.options, self.build = options, build
        groups, hidden, size = build.groups, build.hidden_size, options.head_dim
        kv_heads = options.kv_heads()
        self.num_heads = divide(options.num_heads, groups, "model.mixers.window.num_heads")
        self.num_kv_heads = divide_units(kv_heads, groups, "model.mixers.window.num_kv_heads")
        self.in_proj = ColumnLinear(
            hidden,
            (options.num_heads * size, kv_heads * size, kv_heads * size),
            groups,
            name="model.mixers.window.num_heads",
            units=(options.num_heads, kv_heads, kv_heads),
            bias=bool(options.bias),
        )
        self.g_proj = gate_projection(
            options.gate, hidden, options.num_heads, size, groups, name="model.mixers.window.num_heads"
        )
        self.out_proj = RowLinear(
            options.num_heads * size, hidden, groups, name="model.mixers.window.num_heads", bias=options.bias is True
        )
        self.sinks = None
        if options.sinks:
            self.sinks, self.shards = make_sinks(options.num_heads, groups, "model.mixers.window.num_heads")
        self.q_norm = query_norm(options.qk_norm, options.num_heads, size, build)
        self.k_norm = query_norm(options.qk_norm, kv_heads, size, build)
        self.attention_factor = 1.0
        self.inverse_frequencies: Tensor | None
        self.register_buffer("inverse_frequencies", None, persistent=False)

    @property
    def is_graphable(self) -> bool:
        """Where our kernels attend, as in attention."""
        return self.build.backend == "triton"

    def reset_buffers(self) -> None:
        """Compute the rotary frequencies, on the device of the weights."""
        if self.options.positions == "rope":
            frequencies, self.attention_factor = frequencies_of(self.options.rope(), self.options.head_dim)
            self.inverse_frequencies = frequencies.to(self.out_proj.weight.device)

    def forward(self, x_BTD: Tensor, meta: PackMeta, state: BlockState = None) -> MixerOutput:
        """Mix x [B, T, D] -> y [B, T, D]; with a state the tokens also see its keys, and the newest keys are returned."""
        layers = [self.in_proj] if self.g_proj is None else [self.in_proj, self.g_proj]
        projected_BTX, *gate_BTX = project_layers(x_BTD, layers, self.build.groups)
        q_BTHK, k_BTJK, v_BTJK = self._heads(projected_BTX, meta)
        following: MixerState | None = None
        if meta.segments is not None:
            assert state is None, "rows that are cut over context ranks have no decode state"
            o_BTHK = self._attend_segments(q_BTHK, k_BTJK, v_BTJK, meta.segments)
        elif state is None:
            o_BTHK = self._attend(q_BTHK, k_BTJK, v_BTJK, meta.boundaries_BT())
        else:
            assert isinstance(state, dict), f"a registered mixer got a {type(state).__name__}"
            o_BTHK, following = self._go_on(q_BTHK, k_BTJK, v_BTJK, meta, state)
        if gate_BTX:
            o_BTHK = gate_heads(o_BTHK, gate_BTX[0])
        return MixerOutput(self.out_proj.leave(o_BTHK.flatten(-2), self.build.groups), following)

    def _heads(self, projected_BTX: Tensor, meta: PackMeta) -> tuple[Tensor, Tensor, Tensor]:
        """Split the projection into q [B, T, H, K], k and v [B, T, J, K]; q and k normed and rotated where set."""
        heads, kv_heads, size = self.num_heads, self.num_kv_heads, self.options.head_dim
        parts = list(projected_BTX.split([heads * size, kv_heads * size, kv_heads * size], dim=-1))
        for place, norm in enumerate((self.q_norm, self.k_norm)):
            if isinstance(norm, WideNorm):
                parts[place] = norm(parts[place])
        q_BTHK, k_BTJK, v_BTJK = (part.unflatten(-1, (-1, size)) for part in parts)
        if not isinstance(self.q_norm, HeadNorm) and self.inverse_frequencies is None:
            return q_BTHK, k_BTJK, v_BTJK
        q_BTHK, k_BTJK = qk_norm_rope(
            q_BTHK,
            k_BTJK,
            meta.positions_BT,
            self.inverse_frequencies,
            self.attention_factor,
            q_weight_K=self.q_norm.weight if isinstance(self.q_norm, HeadNorm) else None,
            k_weight_K=self.k_norm.weight if isinstance(self.k_norm, HeadNorm) else None,
            epsilon=self.build.norm_epsilon,
            backend=self.build.backend,
        )
        return q_BTHK, k_BTJK, v_BTJK

    def _attend(self, q_BTHK: Tensor, k_BSJK: Tensor, v_BSJK: Tensor, ids_BS: Tensor | None) -> Tensor:
        window, backend = self.options.window, self.build.backend
        return attention(
            q_BTHK,
            k_BSJK,
            v_BSJK,
            sinks_H=self.sinks,
            document_ids_BS=ids_BS,
            scale=self.options.softmax_scale,
            window=window,
            highest_H=self.noted_logits(),
            backend=backend,
        )

    def _go_on(
        self, q_BTHK: Tensor, k_BTJK: Tensor, v_BTJK: Tensor, meta: PackMeta, state: MixerState
    ) -> tuple[Tensor, MixerState]:
        k_BSJK, v_BSJK = (torch.cat([state[name], new], dim=1) for name, new in (("k", k_BTJK), ("v", v_BTJK)))
        kept = self.options.window - 1
        # Slots of the state that no token has filled yet are another document.
        slot_S = torch.arange(-kept, k_BTJK.shape[1], device=k_BTJK.device)
        ids_BS = torch.where(slot_S < -meta.positions_BT[:, :1], -1, 0)
        following = {"k": k_BSJK[:, k_BSJK.shape[1] - kept :], "v": v_BSJK[:, v_BSJK.shape[1] - kept :]}
        return self._attend(q_BTHK, k_BSJK, v_BSJK, ids_BS), following

    def _attend_segments(self, q_BTHK: Tensor, k_BTJK: Tensor, v_BTJK: Tensor, segments: Segments) -> Tensor:
        """Attend within each of this rank's segments as a row, with the window - 1 keys and values before it."""
        kept = self.options.window - 1
        q_RLHK, k_RLJK, v_RLJK = (segments.as_rows(x) for x in (q_BTHK, k_BTJK, v_BTJK))
        both_RLX = torch.cat([k_RLJK, v_RLJK], dim=2).flatten(2)
        before_RWX = receive_windows(both_RLX, kept, segments, self.build.groups)
        both_RSJK = torch.cat([before_RWX, both_RLX], dim=1).unflatten(2, (-1, self.options.head_dim))
        k_RSJK, v_RSJK = both_RSJK.chunk(2, dim=2)
        # What the mask of windows hides is in another document, or before the row.
        own_RL = segments.as_rows(segments.take(segments.document_ids_BT))
        seen_RW = segments.window_mask(kept).flatten(0, 1)
        ids_RS = torch.cat([torch.where(seen_RW, own_RL[:, :1], -1), own_RL], dim=1)
        o_RLHK = self._attend(q_RLHK, k_RSJK, v_RSJK, ids_RS)
        return o_RLHK.reshape(q_BTHK.shape)

    def scale_logits(self, factors_H: Tensor) -> dict[nn.Parameter, Tensor]:
        """Rows of queries, which come before keys and values."""
        factors = factors_H.repeat_interleave(self.options.head_dim)
        rows = torch.cat([factors, factors.new_ones(2 * self.num_kv_heads * self.options.head_dim)])
        return {each: rows for each in (self.in_proj.weight, self.in_proj.bias) if each is not None}

    def init_parameter(self, name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor | None:
        """Sinks and biases begin at 0."""
        return torch.zeros(shape) if name == "sinks" or name.endswith(".bias") else None

    def empty_state(self, num_rows: int) -> MixerState:
        """Build slots for the keys and values of window - 1 tokens, zeros until tokens fill them."""
        shape = (num_rows, self.options.window - 1, self.num_kv_heads, self.options.head_dim)
        return {"k": self.out_proj.weight.new_zeros(shape), "v": self.out_proj.weight.new_zeros(shape)}

    def sequence_flops(self, sequence_length: int) -> float:
        """FLOPs per token of two products with the keys that it sees on average in a row of this length."""
        window = min(self.options.window, sequence_length)
        keys = window - window * (window - 1) / (2 * sequence_length)
        return 4.0 * keys * self.num_heads * self.options.head_dim
