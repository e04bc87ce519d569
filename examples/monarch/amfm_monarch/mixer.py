"""The sequence mixer of Monarch Mixer (Fu et al. 2023, arXiv 2310.12109), causal; see the README for the formulas."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from amfm.model.mixers.base import ShortConvolution
from amfm.model.mixers.interface import BlockState, BuildContext, MixerOutput, MixerState, SequenceMixer
from amfm.model.packing import PackMeta
from amfm.model.parallel.layers import ColumnLinear, RowLinear
from amfm.model.parallel.regions import enter_tensor_region, leave_tensor_region
from amfm.model.parallel.shards import Shard, ShardSpec
from amfm_monarch.spec import MonarchOptions
from amfm_monarch.transform import convolve

SHORT = 3  # taps of the convolution before the gates
# A kernel has fallen to a hundredth after these shares of max_tokens, from the first channel to the last.
LEAST_REACH, MOST_REACH = 0.3, 1.5


class MonarchMixer(SequenceMixer):
    """[a; b; v] = conv3(W_in u); y = W_out(b (k * (a v)) + k2 * u), with kernels k, k2 of a small network of the place."""

    def __init__(self, options: MonarchOptions, build: BuildContext) -> None:
        super().__init__()
        self.options, self.build, groups, hidden = options, build, build.groups, build.hidden_size
        self.in_proj = ColumnLinear(hidden, (hidden,) * 3, groups, name="model.hidden_size")
        self.conv = ShortConvolution(ShardSpec(0, "tp", (hidden,) * 3), SHORT, groups.tp.size(), activation="none")
        self.out_proj = RowLinear(hidden, hidden, groups, name="model.hidden_size")
        own, size, features = hidden // groups.tp.size(), options.filter_size, 1 + 2 * options.bands
        self.place_in = nn.Parameter(torch.empty(size, features))
        self.place_inner = nn.Parameter(torch.empty(size, size))
        self.kernels = nn.Parameter(torch.empty(2, own, size))
        self.shards = {
            "place_in": Shard(partial=("tp",)),
            "place_inner": Shard(partial=("tp",)),
            "kernels": Shard((ShardSpec(1, "tp", (hidden,)),)),
        }

    def make_kernels(self, tokens: int) -> Tensor:
        """k and k2 of this rank's channels at the first places, [2, C, T]: a network of sines, falling with the place."""
        options, weight = self.options, self.kernels
        wide = torch.promote_types(weight.dtype, torch.float32)
        place_T = torch.arange(tokens, device=weight.device, dtype=wide) / options.max_tokens
        band_F = torch.arange(1, options.bands + 1, device=weight.device, dtype=wide)
        turns_FT = 2 * math.pi * band_F[:, None] * place_T
        features_XT = torch.cat([place_T[None], turns_FT.sin(), turns_FT.cos()])
        inner = (self.place_inner.to(wide) @ (self.place_in.to(wide) @ features_XT).sin()).sin()
        own = weight.shape[1]
        channel_C = torch.arange(own, device=weight.device, dtype=wide) + own * self.build.groups.tp.rank()
        reach_C = LEAST_REACH + (MOST_REACH - LEAST_REACH) * channel_C / max(1, self.build.hidden_size - 1)
        return (weight.to(wide) @ inner) * (math.log(0.01) / reach_C[:, None] * place_T).exp()

    def forward(self, x_BTD: Tensor, meta: PackMeta, state: BlockState = None) -> MixerOutput:
        """u [B, T, D] -> y [B, T, D]; with a state it continues from there. Raises ValueError beyond max_tokens."""
        assert state is None or isinstance(state, dict), f"a registered mixer got a {type(state).__name__}"
        groups = self.build.groups
        x_BTD = enter_tensor_region(x_BTD, groups)
        projected_BTX, window = self.in_proj(x_BTD), None if state is None else state["window"]
        mixed_BTX = self.conv(projected_BTX, meta.boundaries_BT(), window, self.build.backend)
        a_BTC, b_BTC, v_BTC = mixed_BTX.chunk(3, dim=-1)
        own = a_BTC.shape[-1]
        inputs_BT2C = torch.stack([a_BTC * v_BTC, x_BTD.narrow(-1, own * groups.tp.rank(), own)], dim=2)
        following: MixerState | None = None
        if state is None:
            found_BT2C = self.by_document(inputs_BT2C, meta)
        else:
            tokens, past = x_BTD.shape[1], torch.cat([state["inputs"], inputs_BT2C], dim=1)
            self.check_length(past.shape[1])
            found_BT2C = self.read_last(past, tokens)
            joined = torch.cat([window, projected_BTX], dim=1)
            following = {"inputs": past, "window": joined[:, joined.shape[1] - SHORT + 1 :]}
        long_BTC, rest_BTC = found_BT2C.unbind(2)
        return MixerOutput(leave_tensor_region(self.out_proj(b_BTC * long_BTC + rest_BTC), groups), following)

    def by_document(self, inputs_BT2C: Tensor, meta: PackMeta) -> Tensor:
        """Convolve every document on its own, all in one transform as long as the longest needs."""
        if meta.single_document:
            self.check_length(inputs_BT2C.shape[1])
            return self.convolve_rows(inputs_BT2C)
        starts_BT = meta.document_starts_BT()
        assert starts_BT is not None, "rows have boundaries"
        place_BT = torch.arange(starts_BT.shape[1], device=starts_BT.device) - starts_BT.long()
        number_BT = (place_BT == 0).flatten().cumsum(0).view_as(place_BT) - 1  # of all documents, row after row
        longest = int(place_BT.max()) + 1
        self.check_length(longest)
        rows = inputs_BT2C.new_zeros(int(number_BT[-1, -1]) + 1, longest, *inputs_BT2C.shape[2:])
        rows = rows.index_put((number_BT, place_BT), inputs_BT2C)
        return self.convolve_rows(rows)[number_BT, place_BT]

    def convolve_rows(self, inputs_BT2C: Tensor) -> Tensor:
        """Convolve rows from their first token, each pair of channels with its kernel."""
        both_B2CT = inputs_BT2C.permute(0, 2, 3, 1).flatten(1, 2)
        kernels = self.make_kernels(inputs_BT2C.shape[1]).flatten(0, 1)
        return convolve(both_B2CT, kernels).unflatten(1, (2, -1)).permute(0, 3, 1, 2)

    def read_last(self, past_BS2C: Tensor, tokens: int) -> Tensor:
        """Convolve only for the last tokens, each a product with all inputs so far."""
        kernels_2CS = self.make_kernels(past_BS2C.shape[1])
        found = []
        for end in range(past_BS2C.shape[1] - tokens + 1, past_BS2C.shape[1] + 1):
            turned = kernels_2CS[..., :end].flip(-1).permute(2, 0, 1)
            found.append((past_BS2C[:, :end].to(turned.dtype) * turned).sum(1))
        return torch.stack(found, dim=1).to(past_BS2C.dtype)

    def check_length(self, tokens: int) -> None:
        """Raise ValueError if a document is longer than the kernels were made for."""
        if tokens > self.options.max_tokens:
            raise ValueError(
                f"model.mixers.monarch.max_tokens={self.options.max_tokens} must be at least the {tokens} tokens of a "
                "document; raise it before training, or shorten the sequences"
            )

    def init_parameter(self, name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor | None:
        """A network of sines whose kernels have a norm near 1."""
        if name == "kernels":
            return torch.randn(shape, generator=generator) * (2 / (shape[-1] * self.options.max_tokens)) ** 0.5 * 2
        if name in ("place_in", "place_inner"):
            return torch.randn(shape, generator=generator) * (2.0 if name == "place_in" else shape[-1] ** -0.5 * 2)
        return None

    def empty_state(self, num_rows: int) -> MixerState:
        """No inputs yet, [B, 0, 2, C]: they grow with the text, up to max_tokens; and the window of the short convolution."""
        weight, own = self.out_proj.weight, self.kernels.shape[1]
        return {
            "inputs": weight.new_zeros(num_rows, 0, 2, own),
            "window": weight.new_zeros(num_rows, SHORT - 1, 3 * own),
        }

    def sequence_flops(self, sequence_length: int) -> float:
        """FLOPs per token of a transform and its inverse of both inputs, of two products of complex numbers each."""
        m = math.isqrt(2 * sequence_length - 2) + 1
        return 2 * 2 * 8.0 * m**3 * 2 * self.kernels.shape[1] / sequence_length
