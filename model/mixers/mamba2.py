"""The Mamba2 block's mixer (Dao and Gu 2024, arXiv 2405.21060, section 7).

With decay a_t = exp(dt_t A) a head, dt_t = softplus(dt + dt_bias) and A = -exp(A_log), the state h [P, N] of a head follows
h_t = a_t h_(t-1) + dt_t x_t B_t^T and gives y_t = h_t C_t + D x_t. The scan computes it chunk by chunk with matrix products
(kernels/decay_scan/README.md). z, x, B, C and dt come from one projection, so that the residual stream is read once.

It is a decay recurrence like those of `LinearMixer`, but has its own class: its kernel applies dt, A and D inside the
scan, where tensors of their products need not be written to memory.

On the Triton backend all that follows the first projection is one operation (kernels/mamba2), which keeps less for backward
and launches fewer kernels; rows that are cut over context ranks hand it an exchange of states. Decode states and a norm whose
group is on several tensor ranks enter between its parts: there, and on the torch backend, the parts run as separate operations.
On the native backend it is C in float32, decode states too; not over context ranks (`can_be_one_operation`, `takes_state`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from amfm.kernels.causal_conv1d.op import causal_conv1d, causal_conv1d_step
from amfm.kernels.common.limits import refuse_native_sizes
from amfm.kernels.decay_scan.carry import add_carried_state
from amfm.kernels.decay_scan.op import ScanOutput, mamba2_scan, mamba2_step
from amfm.kernels.mamba2.op import MixerSizes, mamba2_mix
from amfm.kernels.norm.op import gated_rms_norm
from amfm.model.config.core_options import Mamba2Config
from amfm.model.mixers.interface import BlockState, BuildContext, MambaState, Mixer, MixerOutput
from amfm.model.mixers.shared_layers import first_decay_rates, first_time_steps
from amfm.model.packing import PackMeta
from amfm.model.parallel.context import SegmentExchange, receive_states, receive_windows
from amfm.model.parallel.groups import ProcessGroupCollection
from amfm.model.parallel.layers import ColumnLinear, RowLinear, project_layers
from amfm.model.parallel.regions import leave_tensor_region, sum_parts
from amfm.model.parallel.shards import Shard, ShardSpec, divide, divide_units, own_shapes
from amfm.model.segments import Segments


class Mamba2Mixer(Mixer):
    """in_proj to z, x, B, C, dt; convolution and SiLU over x, B, C; the scan; norm(y * silu(z)) by group; out_proj.

    Heads and groups are cut over the tensor-parallel ranks; where groups are fewer, neighbouring ranks hold the same B and C,
    and the norm sums the squares of a group over them. dt is not clamped. A, dt and the state are computed in float32 for
    bf16 weights. The convolution, the state and the decay restart at each document.
    """

    has_in_out_updates = True
    is_graphable = True

    def __init__(self, mamba: Mamba2Config, build: BuildContext) -> None:
        super().__init__()
        groups, backend = build.groups, build.backend
        self.options, self.backend, self.groups = mamba, backend, groups
        self.head_dim, self.state_size, self.chunk_size = mamba.head_dim, mamba.state_size, mamba.chunk_size
        self.keep_states = mamba.keep_states
        self.num_heads = divide(mamba.num_heads, groups, "model.mamba.num_heads")
        self.num_groups = divide_units(mamba.num_groups, groups, "model.mamba.num_groups")
        self.inner_size = self.num_heads * self.head_dim
        group_width = mamba.num_groups * mamba.state_size
        inner = mamba.inner_size()
        self.in_proj = ColumnLinear(
            build.hidden_size,
            (inner, inner, group_width, group_width, mamba.num_heads),
            groups,
            name="model.mamba.num_groups",
            units=(mamba.num_heads, mamba.num_heads, mamba.num_groups, mamba.num_groups, mamba.num_heads),
        )
        self.conv = DepthwiseConv(mamba, groups)
        self.A_log = nn.Parameter(torch.empty(self.num_heads))
        self.D = nn.Parameter(torch.empty(self.num_heads))
        self.dt_bias = nn.Parameter(torch.empty(self.num_heads))
        by_head = Shard((ShardSpec(0, "tp", (mamba.num_heads,)),))
        self.shards = {"A_log": by_head, "D": by_head, "dt_bias": by_head}
        self.norm = GatedNorm(inner, mamba.num_groups, build.norm_epsilon, groups, backend)
        self.out_proj = RowLinear(inner, build.hidden_size, groups, name="model.mamba.num_heads")
        unfit = refuse_native_sizes(self.chunk_size, self.state_size, self.head_dim) if backend == "native" else None
        self.is_one_operation = backend in ("triton", "native") and unfit is None and not self.norm.spans_ranks

    def forward(self, x_BTD: Tensor, meta: PackMeta, state: BlockState = None) -> MixerOutput:
        """Mix x [B, T, D] -> y [B, T, D]; with a state the tokens continue it, and the next state is returned.

        Every rank of `groups.tp` and `groups.cp` must call.
        """
        (projected_BTX,) = project_layers(x_BTD, [self.in_proj], self.groups)
        if state is None and self.can_be_one_operation(projected_BTX.dtype, meta):
            mixed_BTD = self._mix(projected_BTX, meta)
            return MixerOutput(leave_tensor_region(mixed_BTD, self.groups), None)
        num_rows, num_tokens, _ = projected_BTX.shape
        z_BTI, inputs_BTC, dt_BTH = projected_BTX.split([self.inner_size, self.conv.channels, self.num_heads], dim=-1)
        next_state: MambaState | None
        if self.backend == "native" and self.is_one_operation and isinstance(state, MambaState):
            from amfm.kernels.mamba2.native_impl import continue_native, takes_state

            if takes_state(projected_BTX) and meta.segments is None and meta.boundaries_BT() is None:
                weights = self.conv.weight, self.conv.bias, self.A_log, self.D, self.dt_bias, self.norm.weight
                normed_BTI, *after = continue_native(projected_BTX, *weights, *state, self._sizes())
                return MixerOutput(leave_tensor_region(self.out_proj(normed_BTI), self.groups), MambaState(*after))
        if isinstance(state, MambaState) and num_tokens == 1:
            y_BTI, next_state = self._step(inputs_BTC[:, 0], dt_BTH[:, 0], state)
        elif meta.segments is not None:
            assert state is None, "rows that are cut over context ranks have no decode state"
            y_BTI, next_state = self._scan_segments(inputs_BTC, dt_BTH, meta, meta.segments), None
        else:
            assert state is None or isinstance(state, MambaState), f"a Mamba2 block got a {type(state).__name__}"
            y_BTI, next_state = self._scan(inputs_BTC, dt_BTH, meta, state)
        y_BTI = self.norm(y_BTI.reshape(num_rows, num_tokens, self.inner_size), z_BTI)
        return MixerOutput(leave_tensor_region(self.out_proj(y_BTI), self.groups), next_state)

    def can_be_one_operation(self, dtype: torch.dtype, meta: PackMeta) -> bool:
        """Whether rows without a state take the one operation of the backend, not its parts."""
        is_taken = self.backend == "triton" or (dtype in (torch.float32, torch.bfloat16) and meta.segments is None)
        return self.is_one_operation and is_taken and self.out_proj.lora is None

    def _mix(self, projected_BTX: Tensor, meta: PackMeta) -> Tensor:
        """From the projection to this rank's addend of the output, [B, T, D], as one operation."""
        segments, starts_BT = meta.segments, meta.document_starts_BT()
        if segments is not None:
            mixed_RLD = self._mix_rows(
                segments.as_rows(projected_BTX),
                None if starts_BT is None else segments.as_rows(starts_BT),
                SegmentExchange(segments, self.groups),
            )
            return mixed_RLD.view(*projected_BTX.shape[:2], -1)
        return self._mix_rows(projected_BTX, starts_BT, None)

    def _mix_rows(self, projected_BTX: Tensor, starts_BT: Tensor | None, exchange: SegmentExchange | None) -> Tensor:
        return mamba2_mix(
            projected_BTX,
            self.conv.weight,
            self.conv.bias,
            self.A_log,
            self.D,
            self.dt_bias,
            self.norm.weight,
            self.out_proj.weight,
            self._sizes(),
            document_starts_BT=starts_BT,
            chunk_size=self.chunk_size,
            keep_states=self.keep_states,
            exchange=exchange,
            backend=self.backend,
        )

    def _sizes(self) -> MixerSizes:
        norm_groups = self.inner_size // self.norm.group_size
        return MixerSizes(
            self.num_heads, self.head_dim, self.num_groups, self.state_size, norm_groups, self.norm.epsilon
        )

    def _scan(
        self, inputs_BTC: Tensor, dt_BTH: Tensor, meta: PackMeta, state: MambaState | None
    ) -> tuple[Tensor, MambaState | None]:
        if state is None:
            return self._recur(inputs_BTC, dt_BTH, meta.boundaries_BT(), None, None)[1].y_BTHP, None
        _, scanned = self._recur(inputs_BTC, dt_BTH, meta.boundaries_BT(), *state)
        seen_BTC = torch.cat([state.window_BWC, inputs_BTC], dim=1)
        window_BWC = seen_BTC[:, seen_BTC.shape[1] - state.window_BWC.shape[1] :]
        return scanned.y_BTHP, MambaState(window_BWC, scanned.final_state_BHPN)

    def _scan_segments(self, inputs_BTC: Tensor, dt_BTH: Tensor, meta: PackMeta, segments: Segments) -> Tensor:
        """Scan this rank's segments from zero as their own rows, and add what the tokens before them add.

        It is added once their state has arrived (kernels/decay_scan/README.md): no second scan, and backward walks the
        sequence once.
        """
        width, num_rows = self.conv.weight.shape[1] - 1, len(inputs_BTC)
        ids_BT = meta.boundaries_BT()
        ids_RL = None if ids_BT is None else segments.as_rows(ids_BT)
        inputs_RLC, dt_RLH = segments.as_rows(inputs_BTC), segments.as_rows(dt_BTH)
        windows_RWC = receive_windows(inputs_RLC, width, segments, self.groups)
        C_RLGN, scanned = self._recur(inputs_RLC, dt_RLH, ids_RL, windows_RWC, None)
        states_B2HPN = receive_states(
            scanned.final_state_BHPN.unflatten(0, (num_rows, 2)),
            scanned.total_decay_BH.unflatten(0, (num_rows, 2)),
            segments,
            self.groups,
        )
        y_RLHP = add_carried_state(
            scanned.y_BTHP,
            dt_RLH,
            self.A_log,
            C_RLGN,
            self.dt_bias,
            states_B2HPN.flatten(0, 1),
            document_ids_BT=ids_RL,
        )
        return y_RLHP.reshape(num_rows, -1, self.inner_size)

    def _recur(
        self,
        inputs_BTC: Tensor,
        dt_BTH: Tensor,
        document_ids_BT: Tensor | None,
        window_BWC: Tensor | None,
        state_BHPN: Tensor | None,
    ) -> tuple[Tensor, ScanOutput]:
        """Convolve and scan rows that begin with this window and state, or with zeros: (C [B, T, G, N], the scan)."""
        convolved_BTC = causal_conv1d(
            inputs_BTC,
            self.conv.weight,
            self.conv.bias,
            document_ids_BT=document_ids_BT,
            initial_window_BWC=window_BWC,
            backend=self.backend,
        )
        x_BTHP, B_BTGN, C_BTGN = self._split(convolved_BTC)
        scanned = mamba2_scan(
            x_BTHP,
            dt_BTH,
            self.A_log,
            B_BTGN,
            C_BTGN,
            self.D,
            self.dt_bias,
            document_ids_BT=document_ids_BT,
            initial_state_BHPN=state_BHPN,
            chunk_size=self.chunk_size,
            keep_states=self.keep_states,
            backend=self.backend,
        )
        return C_BTGN, scanned

    def _step(self, inputs_BC: Tensor, dt_BH: Tensor, state: MambaState) -> tuple[Tensor, MambaState]:
        convolved_BC, window_BWC = causal_conv1d_step(inputs_BC, state.window_BWC, self.conv.weight, self.conv.bias)
        x_BHP, B_BGN, C_BGN = self._split(convolved_BC)
        y_BHP, state_BHPN = mamba2_step(x_BHP, dt_BH, self.A_log, B_BGN, C_BGN, self.D, self.dt_bias, state.state_BHPN)
        return y_BHP, MambaState(window_BWC, state_BHPN)

    def _split(self, convolved: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Split the convolution's channels into x [..., H, P], B and C [..., G, N]."""
        group_width = self.num_groups * self.state_size
        x, B, C = convolved.split([self.inner_size, group_width, group_width], dim=-1)
        return (
            x.unflatten(-1, (self.num_heads, self.head_dim)),
            B.unflatten(-1, (self.num_groups, self.state_size)),
            C.unflatten(-1, (self.num_groups, self.state_size)),
        )

    def empty_state(self, num_rows: int) -> MambaState:
        """Build the state before the first token: zeros; the window in the dtype of the weights, the state in float32."""
        weight = self.conv.weight
        window_BWC = weight.new_zeros(num_rows, weight.shape[1] - 1, self.conv.channels)
        state_BHPN = torch.zeros(num_rows, self.num_heads, self.head_dim, self.state_size, device=weight.device)
        return MambaState(window_BWC, state_BHPN)

    def sequence_flops(self, sequence_length: int) -> float:
        """FLOPs per token of the recurrence, the same at every length."""
        return self.options.recurrence_flops() / self.groups.tp.size()

    def init_parameter(self, name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor | None:
        """Draw A_log and dt_bias as Mamba2's (section 7 of the paper), within the ranges of the options."""
        own = self.options
        if name == "A_log":
            return first_decay_rates(shape, generator, low=own.a_init_min, high=own.a_init_max)
        if name == "dt_bias":
            low, high, floor = own.time_step_min, own.time_step_max, own.time_step_floor
            return first_time_steps(shape, generator, low=low, high=high, floor=floor)
        return None


class DepthwiseConv(nn.Module):
    """The weights of the causal convolution over x, B and C: weight [C, W], bias [C] or None."""

    extra_repr = own_shapes

    def __init__(self, mamba: Mamba2Config, groups: ProcessGroupCollection) -> None:
        super().__init__()
        group_width = mamba.num_groups * mamba.state_size
        units = (mamba.num_heads, mamba.num_groups, mamba.num_groups)
        cut = ShardSpec(0, "tp", (mamba.inner_size(), group_width, group_width), units)
        self.channels = sum(cut.local_segments(groups.tp.size()))
        self.weight = nn.Parameter(torch.empty(self.channels, mamba.conv_kernel))
        self.bias = nn.Parameter(torch.empty(self.channels)) if mamba.conv_bias else None
        self.shards = {"weight": Shard((cut,)), "bias": Shard((cut,))}


class GatedNorm(nn.Module):
    """RMSNorm of y * silu(z) within each of `num_groups` groups of the whole inner width."""

    extra_repr = own_shapes

    def __init__(
        self, inner_size: int, num_groups: int, epsilon: float, groups: ProcessGroupCollection, backend: str
    ) -> None:
        super().__init__()
        num_ranks = groups.tp.size()
        self.weight = nn.Parameter(torch.empty(inner_size // num_ranks))
        self.shards = {"weight": Shard((ShardSpec(0, "tp", (inner_size,)),))}
        self.num_groups, self.epsilon, self.backend, self.groups = num_groups, epsilon, backend, groups
        self.group_size = inner_size // num_groups
        self.spans_ranks = num_groups < num_ranks

    def forward(self, y_BTI: Tensor, z_BTI: Tensor) -> Tensor:
        """Norm y * silu(z), both [B, T, inner of this rank], by group -> the same shape, in the dtype of y."""
        if self.spans_ranks:
            return self._over_ranks(y_BTI, z_BTI)
        normed: Tensor = gated_rms_norm(
            y_BTI,
            z_BTI,
            self.weight,
            self.epsilon,
            num_groups=y_BTI.shape[-1] // self.group_size,
            backend=self.backend,
        )
        return normed

    def _over_ranks(self, y_BTI: Tensor, z_BTI: Tensor) -> Tensor:
        """This rank has a part of one group: the squares of all groups are summed over ranks, one number per token and group."""
        dtype = torch.promote_types(y_BTI.dtype, torch.float32)
        gated_BTI = y_BTI.to(dtype) * functional.silu(z_BTI.to(dtype))
        own = self.groups.tp.rank() * self.num_groups // self.groups.tp.size()
        is_own_G = torch.arange(self.num_groups, device=y_BTI.device) == own  # made there: nothing waits for the host
        squares_BTG = gated_BTI.square().sum(-1, keepdim=True) * is_own_G
        mean_BT1 = sum_parts(squares_BTG, self.groups)[..., own : own + 1] / self.group_size
        return (gated_BTI * torch.rsqrt(mean_BT1 + self.epsilon) * self.weight).to(y_BTI.dtype)
