"""A delta mixer over segments of rows, whose windows and states come from other segments while they are mixed.

By linearity a segment is scanned once, from zero: K more columns of values, zeros that begin with the identity, carry what it does to
any state, and what each token reads of it. An `Exchange` makes the states that enter of these and of the states that leave; what
they add to o is added in the pass that closes it. Backward is one walk back likewise, after the exchange.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from amfm.kernels.common.gradient_sum import GradientSum, gradient_sum_of
from amfm.kernels.delta_block.launch import split_gates
from amfm.kernels.delta_block.passes import Opened, Rows
from amfm.kernels.delta_block.sizes import DeltaSizes
from amfm.kernels.mamba2.exchange import Exchange
from amfm.kernels.runtime.compiling import disable_compile


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
