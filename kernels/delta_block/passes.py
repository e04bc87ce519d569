"""The passes of a delta mixer over rows, out of the kernels of its parts: of whole rows, and of segments of rows.

Gradients of q, k, v, beta, the decay and the gate are written where they are in the gradient of the projection, so nothing is
joined.

Windows and states of a segment come from other segments while they are mixed. By linearity a segment is scanned once, from zero: K more columns of values, zeros that begin with the identity, carry what it does to
any state, and what each token reads of it. An `Exchange` makes the states that enter of these and of the states that leave; what
they add to o is added in the pass that closes it. Backward is one walk back likewise, after the exchange.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from amfm.kernels.common.weight_gradients import GradientSum, add_outer, gradient_sum_of
from amfm.kernels.delta_block.launch import open_gates, open_gates_backward, open_rows, open_rows_backward, split_gates
from amfm.kernels.delta_block.sizes import DeltaSizes, cut_columns, row_ranges
from amfm.kernels.delta_scan.triton_impl import scan_rows, scan_rows_backward
from amfm.kernels.delta_scan.vector.triton_impl import scan_vector_rows, scan_vector_rows_backward
from amfm.kernels.linear.op import linear
from amfm.kernels.mamba2.rank_part import Exchange
from amfm.kernels.norm.heads import norm_heads, norm_heads_backward
from amfm.kernels.runtime.compiling import disable_compile

Places = tuple[Tensor, Tensor | None, Tensor | None]


class Opened(NamedTuple):
    """What the scan reads: q [B, T, G, K], k [B, T, N, G, K], v [B, T, N, H, V], beta [B, T, N, H], g by head or channel."""

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    g: Tensor | None


@dataclass(frozen=True)
class Rows:
    """Rows [B, T, X] of the projection with all that opens and closes them.

    decay, gate: raw numbers that are not in the projection. `starts` [B, T]: where documents begin. `window` [B, W - 1, C]: the
    inputs before each row; None: zeros.
    """

    projected: Tensor
    decay: Tensor | None
    gate: Tensor | None
    conv_weight: Tensor
    A_log: Tensor | None
    dt_bias: Tensor | None
    starts: Tensor | None
    sizes: DeltaSizes
    chunk_size: int
    window: Tensor | None = None

    def parts(self, of: Tensor, decay: Tensor | None, gate: Tensor | None) -> dict[str, Tensor]:
        """Parts of the projection or of its gradient, with the raw numbers that are apart."""
        found = cut_columns(of, self.sizes.widths(decay=decay is None, gate=gate is None))
        return found | {name: x for name, x in (("decay", decay), ("gate", gate)) if x is not None}

    def open(self) -> Opened:
        """Make what the scan reads: a launch for each of q, k, v, beta and g."""
        sizes, parts = self.sizes, self.parts(self.projected, self.decay, self.gate)
        q, k, v = (
            open_rows(parts[name], self.conv_weight[taps], self.starts, _columns(self.window, taps), *how)
            for name, taps, how in zip(("q", "k", "v"), row_ranges(sizes.convolved), self._heads())
        )
        beta = open_gates(parts["beta"], "strength", None, None, sizes.factor, sizes.steps)
        g = None
        if sizes.decays:
            g = open_gates(parts["decay"], sizes.decay, self.A_log, self.dt_bias, sizes.floor)
            g = g.unflatten(-1, (sizes.heads, sizes.key)) if sizes.channels else g
        return Opened(q[:, :, 0], k, v, beta.view(*beta.shape[:2], sizes.steps, sizes.heads), g)

    def _heads(self) -> tuple[tuple[int, int, float | None], ...]:
        """Size of a head, its steps and the length of its vectors, for q, k and v."""
        sizes = self.sizes
        return (sizes.key, 1, sizes.key**-0.5), (sizes.key, sizes.steps, 1.0), (sizes.value, sizes.steps, None)

    def scan(self, opened: Opened, initial: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Output [B, T, H, V] and last state [B, H, K, V] of rows that begin with a state, or with zeros."""
        q, k, v, beta, g = opened
        if g is not None and self.sizes.channels:
            k, v, beta = (x[:, :, 0] for x in (k, v, beta))
            return scan_vector_rows(q, k, v, beta, g, None, initial, self.starts, self.chunk_size)
        return scan_rows(q, k, v, beta, g, initial, self.starts, self.chunk_size)

    def close(self, o: Tensor, added: Tensor | None, norm_weight: Tensor, out_weight: Tensor | None) -> Tensor:
        """The block's output, or without an output weight what it would multiply, [B, T, H V]."""
        gate = self.parts(self.projected, self.decay, self.gate).get("gate")
        closed = norm_heads(o, added, gate, norm_weight, self.sizes.epsilon, self.sizes.act)
        return closed if out_weight is None else linear(closed, out_weight)

    def gradients(self) -> Places:
        """Places for the gradients of the projection, and of raw numbers that are apart."""
        d_decay, d_gate = (None if x is None else x.new_empty(x.shape) for x in (self.decay, self.gate))
        return self.projected.new_empty(self.projected.shape), d_decay, d_gate

    def close_back(
        self,
        d_out: Tensor,
        o: Tensor,
        added: Tensor | None,
        norm_weight: Tensor,
        out_weight: Tensor | None,
        places: Places,
        total: tuple[Tensor | None, bool],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """From the output back to o: its gradient, those of the norm's and of the output's weight; writes that of the gate.

        That of the output's weight is empty if it lands in its sum or there is no such weight.
        """
        d_out = d_out.contiguous()
        d_closed = d_out if out_weight is None else linear(d_out, out_weight.t())
        closed = None if out_weight is None else torch.empty_like(d_closed)
        gate, d_gate = (self.parts(*given).get("gate") for given in ((self.projected, self.decay, self.gate), places))
        d_o, d_norm = norm_heads_backward(
            d_closed, o, added, gate, norm_weight, self.sizes.epsilon, self.sizes.act, d_gate, closed
        )
        place, adds = total
        if closed is None or out_weight is None:
            return d_o, d_norm, d_out.new_empty(0)
        if place is None:
            d_weight = linear(d_out.flatten(0, -2).t(), closed.flatten(0, -2).t()).to(out_weight.dtype)
            return d_o, d_norm, d_weight
        add_outer(place, adds, d_out.flatten(0, -2), closed.flatten(0, -2))
        return d_o, d_norm, out_weight.new_empty(0)

    def scan_back(
        self, d_o: Tensor, d_final: Tensor | None, opened: Opened, initial: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Gradients of q and k [R, B, T, N, G, K], one per head that shares them, of v [1, B, T, N, H, V], beta and g."""
        q, k, v, beta, g = opened
        if g is not None and self.sizes.channels:
            k, v, beta = (x[:, :, 0] for x in (k, v, beta))
            d_q, d_k, d_v, d_beta, d_g, *_ = scan_vector_rows_backward(
                d_o, d_final, q, k, v, beta, g, None, initial, self.starts, self.chunk_size
            )
            d_q, d_k, d_v = (x[None, :, :, None] for x in (d_q, d_k, d_v))
            return d_q, d_k, d_v, d_beta, d_g
        d_q, d_k, d_v, d_beta, d_g, _ = scan_rows_backward(
            d_o, d_final, q, k, v, beta, g, initial, self.starts, self.chunk_size
        )
        return d_q[:, :, :, None], d_k, d_v[None], d_beta, d_g

    def open_back(
        self,
        found: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
        places: Places,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """From what the scan read back to the projection: gradients of taps, of A_log and dt_bias (`split_gates`) and of the window.

        Writes the others.
        """
        sizes, given = self.sizes, self.parts(self.projected, self.decay, self.gate)
        into = self.parts(*places)
        d_conv = self.conv_weight.new_empty(self.conv_weight.shape)
        d_window = None if self.window is None else torch.empty_like(self.window)
        *d_rows, d_beta, d_g = found
        for name, d, taps, (size, _, scale) in zip(
            ("q", "k", "v"), d_rows, row_ranges(sizes.convolved), self._heads(), strict=True
        ):
            open_rows_backward(
                d, given[name], self.conv_weight[taps], self.starts, _columns(self.window, taps), into[name],
                d_conv[taps], _columns(d_window, taps), size, scale,
            )  # fmt: skip
        open_gates_backward(d_beta, given["beta"], "strength", None, None, sizes.factor, into["beta"], sizes.steps)
        d_gates = self.projected.new_empty(0)
        if sizes.decays:
            d_gates = open_gates_backward(
                d_g, given["decay"], sizes.decay, self.A_log, self.dt_bias, sizes.floor, into["decay"]
            )
        return d_conv, d_gates, d_window


def _columns(window: Tensor | None, taps: slice) -> Tensor | None:
    """The channels of one part of windows."""
    return None if window is None else window[..., taps]


def _with_transfer(rows: Rows) -> tuple[Opened, Tensor]:
    """What the scan reads with K more columns of values, and the state that they begin with, [R, H, K, V + K]."""
    q, k, v, beta, g = rows.open()
    sizes, count = rows.sizes, len(v)
    wide = torch.cat([v, v.new_zeros(*v.shape[:-1], sizes.key)], dim=-1)
    initial = beta.new_zeros(count, sizes.heads, sizes.key, sizes.value + sizes.key)
    initial[..., sizes.value :] = torch.eye(sizes.key, device=v.device)
    return Opened(q, k, wide, beta, g), initial


def _read(read_RLHK: Tensor, state_RHKV: Tensor) -> Tensor:
    """What entering states add to o, [R, L, H, V], packed."""
    return torch.matmul(read_RLHK.transpose(1, 2), state_RHKV.to(read_RLHK.dtype)).transpose(1, 2).contiguous()


class _MixSegments(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        projected: Tensor,
        decay: Tensor | None,
        gate: Tensor | None,
        conv_weight: Tensor,
        A_log: Tensor | None,
        dt_bias: Tensor | None,
        norm_weight: Tensor,
        out_weight: Tensor | None,
        starts: Tensor | None,
        sizes: DeltaSizes,
        chunk_size: int,
        exchange: Exchange,
        total: GradientSum | None,
    ) -> Tensor:
        ctx.sizes, ctx.chunk_size, ctx.exchange, ctx.total = sizes, chunk_size, exchange, total
        window = exchange.windows(projected[..., : sizes.channel_count], conv_weight.shape[1] - 1).contiguous()
        rows = Rows(projected, decay, gate, conv_weight, A_log, dt_bias, starts, sizes, chunk_size, window)
        both, final = rows.scan(*_with_transfer(rows))
        leaving, transfer = (x.contiguous() for x in final.split([sizes.value, sizes.key], dim=-1))
        entering, passed = exchange.states(leaving, transfer)
        own = projected, decay, gate, conv_weight, A_log, dt_bias, starts
        ctx.save_for_backward(*own, norm_weight, out_weight, window, both, entering, passed)
        return rows.close(both[..., : sizes.value], _read(both[..., sizes.value :], entering), norm_weight, out_weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        projected, decay, gate, conv_weight, A_log, dt_bias, starts, *kept = ctx.saved_tensors
        norm_weight, out_weight, window, both, entering, passed = kept
        sizes: DeltaSizes = ctx.sizes
        rows = Rows(projected, decay, gate, conv_weight, A_log, dt_bias, starts, sizes, ctx.chunk_size, window)
        o, read = both.split([sizes.value, sizes.key], dim=-1)
        places, total = rows.gradients(), (None, False) if ctx.total is None else ctx.total.take()
        d_o, d_norm, d_out_weight = rows.close_back(
            d_out, o, _read(read, entering), norm_weight, out_weight, places, total
        )
        d_RHLV = d_o.transpose(1, 2)
        d_read = torch.matmul(d_RHLV, entering.to(d_o.dtype).transpose(-1, -2)).transpose(1, 2)
        d_entering = torch.matmul(read.permute(0, 2, 3, 1), d_RHLV).to(entering.dtype)
        d_final = ctx.exchange.states_back(d_entering, passed)
        d_transfer = torch.matmul(d_final, entering.transpose(-1, -2))
        opened, initial = _with_transfer(rows)
        d_q, d_k, d_wide, d_beta, d_g = rows.scan_back(
            torch.cat([d_o, d_read], dim=-1), torch.cat([d_final, d_transfer], dim=-1), opened, initial
        )
        found = d_q, d_k, d_wide[..., : sizes.value].contiguous(), d_beta, d_g
        d_conv, d_gates, d_window = rows.open_back(found, places)
        assert d_window is not None, "segments begin behind windows"
        d_tails = ctx.exchange.windows_back(d_window)
        d_inputs = places[0][..., : sizes.channel_count]
        d_inputs[:, d_inputs.shape[1] - d_tails.shape[1] :] += d_tails
        into_out = None if out_weight is None or ctx.total is not None else d_out_weight
        return *places, d_conv, *split_gates(d_gates, A_log, dt_bias), d_norm, into_out, *(None,) * 5


@disable_compile
def mix_segments(
    projected_RLX: Tensor,
    decay_RLX: Tensor | None,
    gate_RLI: Tensor | None,
    conv_weight_CW: Tensor,
    A_log_H: Tensor | None,
    dt_bias_X: Tensor | None,
    norm_weight_V: Tensor,
    out_weight_DI: Tensor | None,
    starts_RL: Tensor | None,
    sizes: DeltaSizes,
    chunk_size: int,
    exchange: Exchange,
) -> Tensor:
    """As `triton_impl.mix_triton`, of R segments of L tokens; every rank of the exchange must call, in both directions."""
    out: Tensor = _MixSegments.apply(
        projected_RLX, decay_RLX, gate_RLI, conv_weight_CW, A_log_H, dt_bias_X, norm_weight_V, out_weight_DI, starts_RL,
        sizes, chunk_size, exchange, gradient_sum_of(out_weight_DI),
    )  # fmt: skip
    return out
