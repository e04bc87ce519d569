"""The base class of linear mixers: everything that mixers on a linear recurrence share.

A linear mixer says which projections it needs (`parts`), what its recurrence reads of them (`rows`), and what becomes of
the output (`output`), all pointwise in time. The base class does what is hard to get right once per mixer: the short
convolution, resets at documents, tensor-parallel sharding of heads, states that pass between context ranks, decoding with
a state, and FLOP counts. So a new mixer is some thirty lines, and one test suite holds all of them.

Rows that are cut over context ranks are scanned once. Each segment is scanned from a zero state as its own row; the
state that enters it arrives afterwards and adds what it would have added, because the recurrence is linear in its state.
That needs `scan_with_transfer`, which also says what a segment does to an entering state. A scan that waited for the state
would run the ranks one after the other.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from amfm.kernels.causal_conv1d.op import causal_conv1d
from amfm.model.config.mixer_options import HeadOptions, LinearOptions
from amfm.model.mixers.interface import BlockState, BuildContext, MixerOutput, MixerState, SequenceMixer
from amfm.model.mixers.recurrence import Recurrence, ScanRows, ScanSettings, add_initial_state
from amfm.model.packing import PackMeta
from amfm.model.parallel.context import receive_states, receive_windows
from amfm.model.parallel.layers import ColumnLinear, RowLinear
from amfm.model.parallel.regions import leave_tensor_region, project_stream
from amfm.model.parallel.shards import Shard, ShardSpec, divide, own_shapes
from amfm.model.segments import Segments


class Part(NamedTuple):
    """One output of the projection: `size` channels in `units` heads (or groups) of which each stays on one tensor rank.

    units None: a vector that every tensor rank has whole, such as the inside of a low-rank gate.
    """

    size: int
    units: int | None


class LinearMixer(SequenceMixer):
    """Projections, short convolution, a recurrence over matrix states, an output function, out_proj.

    A subclass gives `recurrence`, `parts`, `convolved`, `rows` and `output`. Heads are cut over the tensor ranks. Every rank of
    `groups.tp` and `groups.cp` must call it.
    """

    has_in_out_updates = True
    is_graphable = True
    recurrence: Recurrence

    def __init__(self, options: LinearOptions, build: BuildContext) -> None:
        super().__init__()
        self.options, self.build = options, build
        self.num_heads = divide(options.heads(), build.groups, f"the heads of a {type(self).__name__}")
        self.key_dim, self.value_dim = options.key_dim(), options.value_dim()
        self.shards: dict[str, Shard] = {}
        num_ranks = build.groups.tp.size()
        parts = self.parts()
        # Parts by head are rows of one matrix, in_proj, and cut by head; whole parts are rows of another, shared_proj.
        cut = {name: part for name, part in parts.items() if part.units is not None}
        self.in_proj = ColumnLinear(
            build.hidden_size,
            tuple(part.size for part in cut.values()),
            build.groups,
            name="num_heads",
            units=tuple(part.units or 0 for part in cut.values()),
        )
        self._cut_sizes = dict(zip(cut, cut_of(cut.values()).local_segments(num_ranks)))
        whole = {name: part.size for name, part in parts.items() if part.units is None}
        self._whole_sizes = whole
        self.shared_proj: nn.Parameter | None = None
        if whole:
            self.shared_proj = nn.Parameter(torch.empty(sum(whole.values()), build.hidden_size))
            # Every rank has the gradient that its own heads give.
            self.shards["shared_proj"] = Shard(partial=("tp",))
        self.conv = None
        if self.options.conv_kernel:
            convolved = [parts[name] for name in self.convolved()]
            self.conv = ShortConvolution(cut_of(convolved), options.conv_kernel, num_ranks)
        self.out_proj = RowLinear(options.heads() * self.value_dim, build.hidden_size, build.groups, name="num_heads")

    @abstractmethod
    def parts(self) -> dict[str, Part]:
        """List what the projection gives, by name, in the order of its rows; the convolved ones first."""

    def convolved(self) -> tuple[str, ...]:
        """Name the parts that pass the short convolution, where the options have one."""
        return ("q", "k", "v")

    def accumulate(self, parts: dict[str, Tensor], meta: PackMeta, state: MixerState | None) -> MixerState:
        """Add to the parts what sums over the tokens before each; returns what the decode state keeps of it besides.

        The only step besides convolution and recurrence that may look at other tokens; most mixers have none. With
        `meta.segments` rows are this rank's segments, and every rank of `groups.cp` calls.
        """
        return {}

    @abstractmethod
    def rows(self, parts: dict[str, Tensor], meta: PackMeta) -> ScanRows:
        """Make what the recurrence reads from parts [B, T, channels of this rank]; pointwise in time."""

    @abstractmethod
    def output(self, o_BTHV: Tensor, parts: dict[str, Tensor]) -> Tensor:
        """Make the input of out_proj, [B, T, inner of this rank], from o [B, T, H, V] and the parts; pointwise in time."""

    def forward(self, x_BTD: Tensor, meta: PackMeta, state: BlockState = None) -> MixerOutput:
        """x [B, T, D] -> y [B, T, D]; with a state it continues from there and returns the next one."""
        projected = self._project(x_BTD, ())
        mixed_BTD = None if state is not None else self.at_once(*projected[:2], meta)
        if mixed_BTD is not None:
            return MixerOutput(leave_tensor_region(mixed_BTD, self.build.groups), None)
        parts = self._split(*projected[:2])
        next_state: MixerState | None = None
        if meta.segments is not None:
            assert state is None, "rows that are cut over context ranks have no decode state"
            o_BTHV = self._scan_segments(parts, meta, meta.segments)
        elif state is None:
            o_BTHV = self.mix(parts, meta)
        else:
            assert isinstance(state, dict), f"a registered mixer got a {type(state).__name__}"
            o_BTHV, next_state = self.extend(parts, meta, state)
        y_BTI = self.output(o_BTHV, parts)
        return MixerOutput(leave_tensor_region(self.out_proj(y_BTI), self.build.groups), next_state)

    def at_once(self, cut_BTX: Tensor, whole_BTX: Tensor | None, meta: PackMeta) -> Tensor | None:
        """This rank's addend of the output, [B, T, D], from both projections as one operation; None: from the parts, in turn."""
        return None

    def project(self, x_BTD: Tensor, others: Sequence[Tensor] = ()) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
        """Project the residual stream to the parts [B, T, channels of this rank], and to its products with other weights.

        Every rank of `groups.tp` must call.
        """
        cut_BTX, whole_BTX, products = self._project(x_BTD, others)
        return self._split(cut_BTX, whole_BTX), products

    def _project(self, x_BTD: Tensor, others: Sequence[Tensor]) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...]]:
        """Products with in_proj, with shared_proj if there is one, and with other weights."""
        own = [self.in_proj.weight] + ([] if self.shared_proj is None else [self.shared_proj])
        lora = self.in_proj.lora
        read = own if lora is None else [*own, lora.down]
        products = project_stream(x_BTD, [*read, *others], self.build.groups)
        cut_BTX = products[0] if lora is None else products[0] + lora.raise_rank(products[len(own)])
        return cut_BTX, None if self.shared_proj is None else products[1], products[len(read) :]

    def _split(self, cut_BTX: Tensor, whole_BTX: Tensor | None) -> dict[str, Tensor]:
        """Parts of both projections by name."""
        parts = dict(zip(self._cut_sizes, cut_BTX.split(list(self._cut_sizes.values()), dim=-1)))
        if whole_BTX is not None:
            parts |= self.split_whole(whole_BTX)
        return parts

    def split_whole(self, whole_BTX: Tensor) -> dict[str, Tensor]:
        """Parts that every tensor rank has whole, by name."""
        return dict(zip(self._whole_sizes, whole_BTX.split(list(self._whole_sizes.values()), dim=-1)))

    def mix(self, parts: dict[str, Tensor], meta: PackMeta) -> Tensor:
        """Mix whole rows of documents: outputs [B, T, H, V] of the recurrence. Replaces parts by their convolution."""
        self._convolve(parts, self._convolved_inputs(parts), meta.boundaries_BT(), None)
        self.accumulate(parts, meta, None)
        return self.recurrence.scan(self.rows(parts, meta), self._settings(meta.boundaries_BT()), None)[0]

    def _convolve(
        self, parts: dict[str, Tensor], inputs_BTC: Tensor | None, ids_BT: Tensor | None, window_BWC: Tensor | None
    ) -> None:
        """Convolve inputs that begin after this window, or after zeros, and put the result in place of the parts."""
        if self.conv is None or inputs_BTC is None:
            return
        convolved_BTC = self.conv(inputs_BTC, ids_BT, window_BWC, self.build.backend)
        sizes = [self._cut_sizes[name] for name in self.convolved()]
        parts |= zip(self.convolved(), convolved_BTC.split(sizes, dim=-1))

    def _convolved_inputs(self, parts: dict[str, Tensor]) -> Tensor | None:
        """Join the parts that are convolved, [B, T, C]; None without a convolution."""
        return None if self.conv is None else torch.cat([parts[name] for name in self.convolved()], dim=-1)

    def _settings(self, ids_BT: Tensor | None) -> ScanSettings:
        return ScanSettings(ids_BT, self.options.chunk_size, self.build.backend)

    def extend(self, parts: dict[str, Tensor], meta: PackMeta, state: MixerState) -> tuple[Tensor, MixerState]:
        """Mix the tokens after those of a decode state: outputs [B, T, H, V] and the next state; the old one stays valid.

        One token takes a step of the recurrence, several a scan that begins with the state.
        """
        following: MixerState = {}
        inputs_BTC = self._convolved_inputs(parts)
        if inputs_BTC is not None:
            window_BWC = state["window"]
            seen_BTC = torch.cat([window_BWC, inputs_BTC.to(window_BWC.dtype)], dim=1)
            following["window"] = seen_BTC[:, seen_BTC.shape[1] - window_BWC.shape[1] :]
            self._convolve(parts, inputs_BTC, None, window_BWC)
        following |= self.accumulate(parts, meta, state)
        rows = self.rows(parts, meta)
        if meta.positions_BT.shape[1] == 1:
            token = ScanRows(*(None if x is None else x[:, 0] for x in rows))  # type: ignore[arg-type]
            o_BHV, following["state"] = self.recurrence.step(token, state["state"])
            return o_BHV[:, None], following
        o_BTHV, following["state"] = self.recurrence.scan(rows, self._settings(None), state["state"])
        return o_BTHV, following

    def _scan_segments(self, parts: dict[str, Tensor], meta: PackMeta, segments: Segments) -> Tensor:
        """Scan this rank's segments from zero as their own rows, then add what their entering states add.

        Two exchanges over `groups.cp`: inputs of the convolution with the neighbours, before it; states with all, after.
        """
        own_parts = {name: segments.as_rows(part) for name, part in parts.items()}
        layout = replace(
            meta,
            document_ids_BT=segments.as_rows(meta.document_ids_BT),
            positions_BT=segments.as_rows(meta.positions_BT),
            segments=None,
        )
        inputs_RLC, windows_RWC = self._convolved_inputs(own_parts), None
        if self.conv is not None and inputs_RLC is not None:
            windows_RWC = receive_windows(inputs_RLC, self.conv.weight.shape[1] - 1, segments, self.build.groups)
        self._convolve(own_parts, inputs_RLC, layout.boundaries_BT(), windows_RWC)
        self.accumulate(own_parts, replace(layout, segments=segments), None)
        scan = self.recurrence.scan_with_transfer(self.rows(own_parts, layout), self._settings(layout.boundaries_BT()))
        num_rows = len(meta.positions_BT)
        states_B2HKV = receive_states(
            scan.final_BHKV.unflatten(0, (num_rows, 2)),
            scan.transfer.unflatten(0, (num_rows, 2)),
            segments,
            self.build.groups,
        )
        o_RLHV = add_initial_state(scan, states_B2HKV.flatten(0, 1))
        # As `mix` does: the output reads what the parts have become.
        parts |= {name: part.reshape(num_rows, -1, *part.shape[2:]) for name, part in own_parts.items()}
        return o_RLHV.reshape(num_rows, -1, *o_RLHV.shape[2:])

    def heads(self, part: Tensor) -> Tensor:
        """Split the channels of a part by head: [..., heads of this rank * X] -> [..., heads of this rank, X]."""
        return part.unflatten(-1, (self.num_heads, -1))

    def state_shape(self) -> tuple[int, ...]:
        """Shape of one row's state on this rank: heads, then rows and columns of one head's."""
        return self.num_heads, *self.options.state_shape()

    def empty_state(self, num_rows: int) -> MixerState:
        """Zeros: the window of the convolution in the dtype of the weights, the matrix states in float32."""
        weight = self.out_proj.weight
        state = {"state": torch.zeros(num_rows, *self.state_shape(), device=weight.device)}
        if self.conv is not None:
            channels, width = self.conv.weight.shape
            state["window"] = weight.new_zeros(num_rows, width - 1, channels)
        return state

    def sequence_flops(self, sequence_length: int) -> float:
        """FLOPs per token of the recurrence, the same at every length."""
        return self.recurrence.flops(*self.state_shape())


class ShortConvolution(nn.Module):
    """The causal depthwise convolution before a recurrence, with SiLU (or `none`): weight [C of this rank, W]."""

    extra_repr = own_shapes

    def __init__(self, cut: ShardSpec, width: int, num_ranks: int, activation: str = "silu") -> None:
        super().__init__()
        self.activation = activation
        self.weight = nn.Parameter(torch.empty(sum(cut.local_segments(num_ranks)), width))
        self.shards = {"weight": Shard((cut,))}

    def forward(self, inputs_BTC: Tensor, ids_BT: Tensor | None, window_BWC: Tensor | None, backend: str) -> Tensor:
        """Convolve inputs [B, T, C] -> [B, T, C] after a window of inputs [B, W - 1, C], or zeros; resets at documents."""
        return causal_conv1d(
            inputs_BTC,
            self.weight,
            None,
            document_ids_BT=ids_BT,
            initial_window_BWC=window_BWC,
            activation=self.activation,
            backend=backend,
        )


def cut_of(parts: Iterable[Part]) -> ShardSpec:
    """Build the cut of a stacked projection's rows, or of its convolution's channels, over the tensor ranks."""
    found = list(parts)
    return ShardSpec(0, "tp", tuple(part.size for part in found), tuple(part.units or 0 for part in found))


def query_key_value(options: HeadOptions) -> dict[str, Part]:
    """List q, k and v by head, the parts of a mixer without gates."""
    heads = options.num_heads
    keys = Part(heads * options.head_dim, heads)
    return {"q": keys, "k": keys, "v": Part(heads * options.value_dim(), heads)}


def no_decay(q_BTHK: Tensor) -> Tensor:
    """Make log decays [B, T, H] of 0, which forget nothing, in float32 at least."""
    return q_BTHK.new_zeros(q_BTHK.shape[:3], dtype=torch.promote_types(q_BTHK.dtype, torch.float32))
