"""Mamba, the first one: a selective scan with a decay of each state number (S6).

Its decay e^(dt_t A) differs for each channel and state number, so a chunk cannot be computed by matrix products as in
Mamba2, and diag_scan walks over the tokens. In the terms of the linear mixers a channel is a head whose value has one
number, C is the query, B the key and x the value; B and C are shared by all channels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from amfm.kernels.linear.op import linear
from amfm.model.mixers.base import LinearMixer, Part
from amfm.model.mixers.interface import BuildContext
from amfm.model.mixers.recurrence import OpenScan, Recurrence, ScanRows, ScanSettings
from amfm.model.mixers.shared_layers import first_time_steps
from amfm.model.packing import PackMeta
from amfm.model.parallel.layers import RowLinear
from amfm.model.parallel.regions import sum_parts
from amfm.model.parallel.shards import Shard, ShardSpec
from amfm_mixers.diag_scan.op import diag_scan, diag_step
from amfm_mixers.diag_scan.torch_impl import read_carried_state
from amfm_mixers.options import Mamba1Options


class Mamba1Mixer(LinearMixer):
    """in_proj to x and z; convolution and SiLU over x; dt (low-rank), B and C from x; the scan; times silu(z); out_proj.

    Each channel is a head with a state of [state_size, 1]. Channels are cut over the tensor ranks, which sum what they give
    to dt, B and C: one all-reduce of dt_rank + 2 state_size numbers per token.
    Source: Gu and Dao 2023, arXiv 2312.00752, sections 3.2 to 3.4.
    """

    options: Mamba1Options

    def __init__(self, options: Mamba1Options, build: BuildContext) -> None:
        super().__init__(options, build)
        self.dt_rank = options.dt_rank or math.ceil(build.hidden_size / 16)
        low_rank_size = self.dt_rank + 2 * options.state_size
        self.x_proj = RowLinear(options.inner_size, low_rank_size, build.groups, name="inner_size")
        self.dt_proj = nn.Parameter(torch.empty(self.num_heads, self.dt_rank))
        self.A_log = nn.Parameter(torch.empty(self.num_heads, options.state_size))
        self.D = nn.Parameter(torch.empty(self.num_heads))
        self.dt_bias = nn.Parameter(torch.empty(self.num_heads))
        by_channel = Shard((ShardSpec(0, "tp", (options.inner_size,)),))
        self.shards |= dict.fromkeys(("dt_proj", "A_log", "D", "dt_bias"), by_channel)
        self.recurrence = SelectiveRecurrence(self)

    def parts(self) -> dict[str, Part]:
        """x and the gate z, by channel."""
        channels = Part(self.options.inner_size, self.options.inner_size)
        return {"x": channels, "z": channels}

    def convolved(self) -> tuple[str, ...]:
        """Name only x."""
        return ("x",)

    def rows(self, parts: dict[str, Tensor], meta: PackMeta) -> ScanRows:
        """C as q, B as k, x as v and the raw time step as g; pointwise in time."""
        x_BTC = parts["x"] if self.conv is not None else functional.silu(parts["x"])
        # dt, B and C read all channels, of which this rank has a part.
        low_BTR = sum_parts(self.x_proj(x_BTC), self.build.groups)
        size = self.options.state_size
        dt_BTR, B_BTN, C_BTN = low_BTR.split([self.dt_rank, size, size], dim=-1)
        return ScanRows(C_BTN, B_BTN, x_BTC, linear(dt_BTR, self.dt_proj))

    def output(self, o_BTHV: Tensor, parts: dict[str, Tensor]) -> Tensor:
        """Times silu(z)."""
        return o_BTHV.flatten(-2) * functional.silu(parts["z"])

    def init_parameter(self, name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor | None:
        """Set -A = 1..N in each channel, and draw log-uniform time steps (sections 3.6 and E.2)."""
        if name == "A_log":
            return torch.arange(1, shape[1] + 1, dtype=torch.float32).log().expand(shape).clone()
        if name == "dt_bias":
            return first_time_steps(shape, generator)
        bound = self.dt_rank**-0.5
        return torch.empty(shape).uniform_(-bound, bound, generator=generator) if name == "dt_proj" else None


class SelectiveRecurrence(Recurrence):
    """h_t = e^(dt_t A) h_(t-1) + dt_t x_t B_t, y_t = h_t C_t + D x_t, with A and D of a mixer (diag_scan)."""

    def __init__(self, mixer: Mamba1Mixer) -> None:
        self.mixer = mixer

    def _arguments(self, rows: ScanRows) -> tuple[Tensor, ...]:
        """Arguments of the kernels, x, dt, A_log, B, C, D and dt_bias, out of rows and mixer."""
        mixer = self.mixer
        assert rows.g is not None, "a selective scan needs time steps"
        return rows.v, rows.g, mixer.A_log, rows.k, rows.q, mixer.D, mixer.dt_bias

    def scan(self, rows: ScanRows, how: ScanSettings, state_BHKV: Tensor | None) -> tuple[Tensor, Tensor]:
        """As in the base class."""
        initial_BCN = None if state_BHKV is None else state_BHKV[..., 0]
        scanned = diag_scan(*self._arguments(rows), initial_state_BCN=initial_BCN, **how._asdict())
        return scanned.y_BTC[..., None], scanned.final_state_BCN[..., None]

    def scan_with_transfer(self, rows: ScanRows, how: ScanSettings) -> OpenScan:
        """As in the base class; the decays of all tokens, N times as wide as x, are never kept."""
        _, dt_BTC, A_log_CN, _, C_BTN, _, dt_bias_C = self._arguments(rows)
        scanned = diag_scan(*self._arguments(rows), **how._asdict())

        def read(state_BHKV: Tensor) -> Tensor:
            arguments = (dt_BTC, A_log_CN, C_BTN, dt_bias_C, state_BHKV[..., 0])
            return read_carried_state(*arguments, document_ids_BT=how.document_ids_BT)[..., None]

        return OpenScan(scanned.y_BTC[..., None], read, scanned.final_state_BCN[..., None], scanned.total_decay_BCN)

    def step(self, rows: ScanRows, state_BHKV: Tensor) -> tuple[Tensor, Tensor]:
        """As in the base class."""
        x_BC, dt_BC, A_log_CN, B_BN, C_BN, D_C, dt_bias_C = self._arguments(rows)
        y_BC, state_BCN = diag_step(x_BC, dt_BC, A_log_CN, B_BN, C_BN, D_C, dt_bias_C, state_BHKV[..., 0])
        return y_BC[..., None], state_BCN[..., None]

    def flops(self, num_heads: int, key_dim: int, value_dim: int) -> float:
        """Forward FLOPs per token; for each state number: decay, B times x, add, times C, add; then D x."""
        return 5.0 * num_heads * key_dim * value_dim + 2.0 * num_heads
