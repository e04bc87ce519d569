"""The gated short convolution of LFM2: two gates around a causal depthwise convolution, and no recurrence.

A token reads the few before it and nothing else, so the state is a few products per channel whatever the length of the text,
and context ranks send their neighbours no more than that. What is far is left to the attention blocks between.
"""

from __future__ import annotations

import torch
from torch import Tensor

from amfm.model.config.mixer_options import ShortConvOptions
from amfm.model.mixers.base import Part, ShortConvolution, cut_of
from amfm.model.mixers.interface import BlockState, BuildContext, MixerOutput, MixerState, SequenceMixer
from amfm.model.packing import PackMeta
from amfm.model.parallel.context import receive_windows
from amfm.model.parallel.layers import ColumnLinear, RowLinear
from amfm.model.parallel.regions import leave_tensor_region, project_stream
from amfm.model.parallel.shards import divide


class ShortConvMixer(SequenceMixer):
    """[B; C; x] = W_in u, y = W_out (C * conv(B * x)), each of the residual stream's width; no SiLU and no norm inside.

    Channels are cut over the tensor ranks. Every rank of `groups.tp` and `groups.cp` must call.
    Source: Liquid AI 2025, "LFM2 technical report", arXiv 2511.23404, section 2.
    """

    is_graphable = True

    def __init__(self, options: ShortConvOptions, build: BuildContext) -> None:
        super().__init__()
        self.options, self.build = options, build
        width, name = build.hidden_size, "model.hidden_size"
        self.channels = divide(width, build.groups, name)
        self.in_proj = ColumnLinear(width, (width, width, width), build.groups, name=name)
        self.out_proj = RowLinear(width, width, build.groups, name=name)
        cut = cut_of([Part(width, width)])
        self.conv = ShortConvolution(cut, options.conv_kernel, build.groups.tp.size(), activation="none")

    def forward(self, x_BTD: Tensor, meta: PackMeta, state: BlockState = None) -> MixerOutput:
        """Mix x [B, T, D] -> y [B, T, D]; with a state it continues from there and returns the next one."""
        (projected_BTX,) = project_stream(x_BTD, [self.in_proj.weight], self.build.groups)
        entry_BTC, exit_BTC, values_BTC = projected_BTX.split(self.channels, dim=-1)
        inputs_BTC = entry_BTC * values_BTC
        following: MixerState | None = None
        backend = self.build.backend
        if meta.segments is not None:
            assert state is None, "rows that are cut over context ranks have no decode state"
            segments = meta.segments
            inputs_RLC, ids_RL = segments.as_rows(inputs_BTC), segments.as_rows(meta.document_ids_BT)
            before_RWC = receive_windows(inputs_RLC, self.options.conv_kernel - 1, segments, self.build.groups)
            mixed_BTC = self.conv(inputs_RLC, ids_RL, before_RWC, backend).reshape(inputs_BTC.shape)
        elif state is None:
            mixed_BTC = self.conv(inputs_BTC, meta.boundaries_BT(), None, backend)
        else:
            assert isinstance(state, dict), f"a registered mixer got a {type(state).__name__}"
            window_BWC = state["window"]
            seen_BTC = torch.cat([window_BWC, inputs_BTC], dim=1)
            following = {"window": seen_BTC[:, seen_BTC.shape[1] - window_BWC.shape[1] :]}
            mixed_BTC = self.conv(inputs_BTC, None, window_BWC, backend)
        y_BTD = leave_tensor_region(self.out_proj(exit_BTC * mixed_BTC), self.build.groups)
        return MixerOutput(y_BTD, following)

    def empty_state(self, num_rows: int) -> MixerState:
        """Zeros for the last conv_kernel - 1 inputs of the convolution, in the dtype of the weights."""
        return {"window": self.conv.weight.new_zeros(num_rows, self.options.conv_kernel - 1, self.channels)}

    def sequence_flops(self, sequence_length: int) -> float:
        """FLOPs per token of the taps and both gates, the same at every length."""
        return self.channels * (2.0 * self.options.conv_kernel + 2.0)
