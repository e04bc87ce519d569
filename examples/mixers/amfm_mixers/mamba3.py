"""The mixer of Mamba-3, with one input and one output per head (SISO): Mamba2's recurrence, turned and of second order.

Three things differ from Mamba2: what a token writes is averaged over both ends of its step (the trapezoidal rule in place of
Euler's), B and C are rotated by an angle that sums up over the document, which is a state with complex decay, and there
need be no convolution. For a head, with dt = softplus(dt + dt_bias), phi_t = phi_(t-1) + pi tanh(theta_t) dt_t, B'_t =
R(phi_t) (norm(B_t) + B_bias) and C' alike, lambda a sigmoid, and a < 0 of the input:

    h_t = e^(a_t dt_t) (h_(t-1) + (1 - lambda_t) dt_t B'_(t-1) x_(t-1)^T) + lambda_t dt_t B'_t x_t^T
    y_t = (h_t^T C'_t + D x_t) * silu(z_t)

It is a decay scan between two maps. Let each token add what the token before it contributed,

    S_t = e^(a_t dt_t) S_(t-1) + e^(a_t dt_t) (lambda_(t-1) dt_(t-1) + (1 - lambda_t) dt_t) B'_(t-1) x_(t-1)^T

then h_t = S_t + lambda_t dt_t B'_t x_t^T, whose second term reads as lambda_t dt_t (C'_t . B'_t) x_t. Published kernels scan the
tokens' own writes, for which they look at the token that follows, and subtract; here no bit depends on a later token.

Source: Lahoti et al. 2026, "Mamba-3: Improved Sequence Modeling using State Space Principles", in the parameterization of
state-spaces/mamba. Several inputs and outputs per head (MIMO) would need their own scan.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from amfm.model.mixers.base import LinearMixer, Part
from amfm.model.mixers.interface import BuildContext, MixerState
from amfm.model.mixers.recurrence import DecayRecurrence, ScanRows
from amfm.model.mixers.shared_layers import GatedHeadNorm, first_time_steps
from amfm.model.packing import PackMeta
from amfm.model.parallel.context import receive_states, receive_windows
from amfm.model.parallel.shards import Shard, ShardSpec, divide_units
from amfm_mixers.options import Mamba3Options
from amfm_mixers.running_angles import dot_heads, sum_angles, turn_heads, within_turn

# The least rate of decay.
RATE_FLOOR = 1e-4
# What a token's successor reads of it, next to its angle.
PASSED = ("x", "B", "dt", "lambda")


class Mamba3Mixer(LinearMixer):
    """Mamba-3 with one input and output per head. B and C come in groups of heads, theta is one for all heads."""

    options: Mamba3Options
    recurrence = DecayRecurrence()

    def __init__(self, options: Mamba3Options, build: BuildContext) -> None:
        self.num_groups = divide_units(options.num_groups, build.groups, "num_groups")
        super().__init__(options, build)
        heads, size = options.num_heads, options.state_size
        self.B_bias = nn.Parameter(torch.empty(self.num_heads * size))
        self.C_bias = nn.Parameter(torch.empty(self.num_heads * size))
        self.dt_bias = nn.Parameter(torch.empty(self.num_heads))
        self.D = nn.Parameter(torch.empty(self.num_heads))
        self.shards |= dict.fromkeys(("B_bias", "C_bias"), Shard((ShardSpec(0, "tp", (heads * size,), (heads,)),)))
        self.shards |= dict.fromkeys(("dt_bias", "D"), Shard((ShardSpec(0, "tp", (heads,)),)))
        self.B_norm, self.C_norm = GatedHeadNorm(size, build), GatedHeadNorm(size, build)

    def parts(self) -> dict[str, Part]:
        """x, B, C; the gate z; time step, rate of decay and lambda by head; theta whole."""
        own = self.options
        inner = Part(own.num_heads * own.head_dim, own.num_heads)
        by_group, by_head = Part(own.num_groups * own.state_size, own.num_groups), Part(own.num_heads, own.num_heads)
        narrow = {"dt": by_head, "rate": by_head, "lambda": by_head, "theta": Part(own.num_angles(), None)}
        return {"x": inner, "B": by_group, "C": by_group, "z": inner, **narrow}

    def convolved(self) -> tuple[str, ...]:
        """As in Mamba2, where a convolution is asked for."""
        return ("x", "B", "C")

    def accumulate(self, parts: dict[str, Tensor], meta: PackMeta, state: MixerState | None) -> MixerState:
        """Add what the scan reads, `q`, `k`, `v` and `g`, and `own`, by how much of x a token reads of its own write.

        The state keeps the last token's angle, and what its successor reads of it. S: the token before the row and its T.
        """
        before_B1X = self._before_row(parts, meta, state)
        sizes = [parts[name].shape[-1] for name in PASSED]
        x_BSX, B_BSX, dt_BSH, blend_BSH = (
            torch.cat([first, parts[name]], dim=1) for name, first in zip(PASSED, before_B1X.split(sizes, dim=-1))
        )
        wide = torch.promote_types(dt_BSH.dtype, torch.float32)
        dt_BSH = functional.softplus(dt_BSH.to(wide) + self.dt_bias.to(wide))
        late_BSH = blend_BSH.to(wide).sigmoid() * dt_BSH
        angles_BSHA = self._angles(parts["theta"], dt_BSH[:, 1:], meta, state)
        parts["g"] = -heavy_tail(parts["rate"].to(wide)).clamp(min=RATE_FLOOR) * dt_BSH[:, 1:]
        written_BTH = parts["g"].exp() * (late_BSH[:, :-1] + dt_BSH[:, 1:] - late_BSH[:, 1:])
        if meta.boundaries_BT() is not None:
            is_same_BT = functional.pad(meta.document_ids_BT.diff(dim=1) == 0, (1, 0), value=True)
            written_BTH = torch.where(is_same_BT[..., None], written_BTH, torch.zeros_like(written_BTH))
        B_BSGN, C_BTGN = self._by_group(self.B_norm, B_BSX), self._by_group(self.C_norm, parts["C"])
        B_bias_HN, C_bias_HN = (bias.view(-1, self.key_dim) for bias in (self.B_bias, self.C_bias))
        parts["q"] = turn_heads(C_BTGN, C_bias_HN, angles_BSHA[:, 1:])
        parts["k"] = turn_heads(B_BSGN[:, :-1], B_bias_HN, angles_BSHA[:, :-1], written_BTH)
        parts["v"] = x_BSX[:, :-1]
        # Rotated by one angle, B and C have the product that they have without.
        parts["own"] = late_BSH[:, 1:] * dot_heads(B_BSGN[:, 1:], B_bias_HN, C_BTGN, C_bias_HN)
        if state is None:
            return {}
        return {"angle": angles_BSHA[:, -1], "before": torch.cat([parts[name][:, -1:] for name in PASSED], dim=-1)}

    def _before_row(self, parts: dict[str, Tensor], meta: PackMeta, state: MixerState | None) -> Tensor:
        """What a row's first token reads of the one before it, [B, 1, X]; zeros, of which x writes nothing, if none is."""
        if state is not None:
            return state["before"].to(parts["x"].dtype)
        if meta.segments is None:
            return parts["x"].new_zeros(len(parts["x"]), 1, self._passed_size())
        passed_BTX = torch.cat([parts[name] for name in PASSED], dim=-1)
        return receive_windows(passed_BTX, 1, meta.segments, self.build.groups)

    def _angles(self, theta_BTA: Tensor, dt_BTH: Tensor, meta: PackMeta, state: MixerState | None) -> Tensor:
        """Sum the angles of each head over the document up to each token: [B, S, H, A], first those that enter the row."""
        turns_BTHA = dt_BTH[..., None] * (math.pi * theta_BTA.to(dt_BTH.dtype).tanh())[:, :, None]
        angles_BTHA = sum_angles(turns_BTHA.flatten(2), meta.boundaries_BT()).view_as(turns_BTHA)
        if state is not None:
            entering_B1HA = state["angle"].to(dt_BTH.dtype)[:, None]
            return torch.cat([entering_B1HA, within_turn(angles_BTHA + entering_B1HA)], dim=1)
        if meta.segments is None:
            return functional.pad(angles_BTHA, (0, 0, 0, 0, 1, 0))
        # The angle passes between segments as a state that nothing decays; from a row's second document on none enters.
        is_first_BT11 = (meta.document_ids_BT == meta.document_ids_BT[:, :1])[..., None, None]
        passes_BH = is_first_BT11[:, -1, 0].to(dt_BTH.dtype).expand(-1, self.num_heads)
        last_B2HA1, passes_B2H = (x.unflatten(0, (-1, 2)) for x in (angles_BTHA[:, -1, ..., None], passes_BH))
        entering_B2HA1 = receive_states(last_B2HA1, passes_B2H, meta.segments, self.build.groups)
        entering_B1HA = entering_B2HA1.flatten(0, 1)[:, None, ..., 0]
        added_BTHA = torch.where(is_first_BT11, entering_B1HA, torch.zeros_like(entering_B1HA))
        return torch.cat([entering_B1HA, angles_BTHA + added_BTHA], dim=1)

    def _by_group(self, norm: GatedHeadNorm, part_BTX: Tensor) -> Tensor:
        """Norm B or C by group: [B, T, G, N]."""
        return norm(part_BTX.unflatten(-1, (self.num_groups, -1)), None).unflatten(-1, (self.num_groups, -1))

    def _passed_size(self) -> int:
        return self.num_heads * (self.value_dim + 2) + self.num_groups * self.key_dim

    def rows(self, parts: dict[str, Tensor], meta: PackMeta) -> ScanRows:
        """C' as q; B' and x of the token before, scaled, as k and v; a dt as g."""
        return ScanRows(parts["q"], parts["k"], self.heads(parts["v"]), parts["g"])

    def output(self, o_BTHV: Tensor, parts: dict[str, Tensor]) -> Tensor:
        """Add what a token reads of its own write and by D, times silu(z); in float32 for bf16."""
        own_BTH = parts["own"]
        read_BTHV = o_BTHV + (self.D.to(own_BTH.dtype) + own_BTH)[..., None] * self.heads(parts["x"])
        return (read_BTHV.flatten(-2) * functional.silu(parts["z"].to(own_BTH.dtype))).to(o_BTHV.dtype)

    def empty_state(self, num_rows: int) -> MixerState:
        """Build the base class's state; no angle, and nothing before the first token."""
        state, weight = super().empty_state(num_rows), self.out_proj.weight
        angle = state["state"].new_zeros(num_rows, self.num_heads, self.options.num_angles())
        return state | {"angle": angle, "before": weight.new_zeros(num_rows, 1, self._passed_size())}

    def sequence_flops(self, sequence_length: int) -> float:
        """FLOPs per token of the scan, and of what a token reads of its own write and by D."""
        heads, key_dim, value_dim = self.state_shape()
        return super().sequence_flops(sequence_length) + 2.0 * heads * (key_dim + value_dim)

    def init_parameter(self, name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor | None:
        """Set biases of B and C to 1, and draw dt_bias as Mamba2's."""
        if name in ("B_bias", "C_bias"):
            return torch.ones(shape)
        return first_time_steps(shape, generator) if name == "dt_bias" else None


def heavy_tail(x: Tensor) -> Tensor:
    """1 + x above 0, 1 / (1 - x) below: positive, with one slope at 0."""
    return x.clamp(min=0.0) + 1.0 / (1.0 - x.clamp(max=0.0))
