"""Mamba2's mixer over segments of rows, whose states and windows come from other segments while they are mixed.

The state that enters a segment is known when all before it have been walked, on other ranks. So forward walks each segment from
zero first, on chip, only for what leaves it; an `Exchange` makes of these states those that enter; and what follows is what whole
rows take, from them. Backward has the same problem the other way round and takes the same fix: a walk back from zero for the
gradient of the state that enters, the exchange, and the whole of it from the gradient of the state that leaves.

Two walks for one, as where rows of one GPU are cut (common/scan_launch.py); the first reads x, B and dt, or the gradient of y, C
and dt, and writes one state a segment. The alternative, to scan from zero and add what the entering state adds (decay_scan/carry.py),
passes over y, its gradient and C again, and keeps y and the gates apart. An operation that takes a state and returns one, left to
autograd, would make the ranks wait for one another, one after the other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from amfm.kernels.causal_conv1d.triton_impl import split_taps
from amfm.kernels.common.custom_op import fake_of
from amfm.kernels.common.weight_gradients import GradientSum, gradient_sum_of
from amfm.kernels.mamba2.passes import (
    Rows,
    fake_sizes,
    mixed_like,
    norm_gradients_like,
    scan_gradients_like,
    split_heads,
)
from amfm.kernels.mamba2.rank_part import Exchange, MixerSizes
from amfm.kernels.runtime.compiling import disable_compile


@torch.library.custom_op("amfm::mamba2_leaving_triton", mutates_args=())
def _leaving(
    projected: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    A_log: Tensor,
    dt_bias: Tensor,
    starts: Tensor | None,
    window: Tensor,
    numbers: list[int],
    epsilon: float,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The convolved channels, and of each segment from zero the state after it and its factor, in float32."""
    sizes = MixerSizes.of(numbers, epsilon)
    rows = Rows.of(projected, conv_weight, conv_bias, A_log, dt_bias, starts, sizes, chunk_size, window)
    final, factor = rows.leaving()
    return rows.convolved, final.contiguous(), factor.contiguous()


@fake_of(_leaving)
def _(given: Any) -> tuple[Tensor, ...]:
    (sizes, rows, tokens, (_, _, *state)), projected = fake_sizes(given), given.projected
    return (
        projected.new_empty(rows, tokens, sizes.channels),
        projected.new_empty(rows, *state, dtype=torch.float32),
        projected.new_empty(rows, sizes.heads, dtype=torch.float32),
    )


@torch.library.custom_op("amfm::mamba2_entered_triton", mutates_args=())
def _entered(
    projected: Tensor,
    convolved: Tensor,
    A_log: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    norm_weight: Tensor,
    out_weight: Tensor | None,
    starts: Tensor | None,
    initial: Tensor,
    numbers: list[int],
    epsilon: float,
    chunk_size: int,
    keep_states: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As the operation of whole rows after its convolution, from the states that enter."""
    sizes = MixerSizes.of(numbers, epsilon)
    rows = Rows(projected, convolved, A_log, dt_bias, starts, sizes, chunk_size, initial)
    return rows.mix(D, norm_weight, out_weight, keep_states)


@fake_of(_entered)
def _(given: Any) -> tuple[Tensor, ...]:
    return mixed_like(given)


@torch.library.custom_op("amfm::mamba2_entered_triton_backward", mutates_args=("out_weight_sum",))
def _entered_backward(
    d_out: Tensor,
    projected: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    A_log: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    norm_weight: Tensor,
    out_weight: Tensor | None,
    starts: Tensor | None,
    window: Tensor,
    initial: Tensor,
    reciprocal: Tensor,
    y: Tensor,
    entering: Tensor,
    numbers: list[int],
    epsilon: float,
    chunk_size: int,
    out_weight_sum: Tensor | None,
    out_weight_adds: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As far as the states that enter, from zero after the segments.

    The gradient of the projection, of which only z's part is written, of y, and of the states that enter; the convolved channels
    and the states that enter chunks, which the rest needs (empty if forward kept these); gradients of both weights.
    """
    sizes, d_projected = MixerSizes.of(numbers, epsilon), projected.new_empty(projected.shape)
    rows = Rows.of(projected, conv_weight, conv_bias, A_log, dt_bias, starts, sizes, chunk_size, window, initial)
    y, states = rows.recompute(D, y, entering)
    weights = norm_weight, out_weight
    d_y, d_norm, d_weight = rows.norm_back(d_out, y, reciprocal, *weights, d_projected, out_weight_sum, out_weight_adds)
    made = states.new_empty(0) if entering.numel() else states
    return d_projected, d_y, rows.leaving_back(d_y).contiguous(), rows.convolved, made, d_norm, d_weight


@fake_of(_entered_backward)
def _(given: Any) -> tuple[Tensor, ...]:
    (sizes, rows, tokens, states), projected = fake_sizes(given), given.projected
    return (
        projected.new_empty(projected.shape),
        projected.new_empty(rows, tokens, sizes.inner),
        given.initial.new_empty(given.initial.shape),
        projected.new_empty(rows, tokens, sizes.channels),
        projected.new_empty((0,) if given.entering.numel() else states),
        *norm_gradients_like(given),
    )


@torch.library.custom_op("amfm::mamba2_leaving_triton_backward", mutates_args=("d_projected",))
def _leaving_backward(
    d_projected: Tensor,
    d_y: Tensor,
    d_final: Tensor,
    projected: Tensor,
    convolved: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    A_log: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    starts: Tensor | None,
    window: Tensor,
    entering: Tensor,
    numbers: list[int],
    epsilon: float,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The rest, from the gradients of the states that leave: writes the gradients of x, B, C and dt.

    Gradients of the convolution's weight and bias as one, of A_log, dt_bias and D [3, H], and of the windows.
    """
    sizes = MixerSizes.of(numbers, epsilon)
    rows = Rows(projected, convolved, A_log, dt_bias, starts, sizes, chunk_size)
    d_taps, d_heads, d_window = rows.scan_back(D, entering, d_y, d_final, conv_weight, conv_bias, window, d_projected)
    assert d_window is not None, "segments begin behind windows"
    return d_taps, d_heads, d_window


@fake_of(_leaving_backward)
def _(given: Any) -> tuple[Tensor, ...]:
    return *scan_gradients_like(given), given.window.new_empty(given.window.shape)


class _MixSegments(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        projected: Tensor,
        conv_weight: Tensor,
        conv_bias: Tensor | None,
        A_log: Tensor,
        D: Tensor,
        dt_bias: Tensor,
        norm_weight: Tensor,
        out_weight: Tensor | None,
        starts: Tensor | None,
        sizes: MixerSizes,
        chunk_size: int,
        keep_states: bool,
        exchange: Exchange,
        total: GradientSum | None,
    ) -> Tensor:
        ctx.exchange, ctx.total, ctx.settings = exchange, total, (sizes.numbers, sizes.epsilon, chunk_size)
        _, inputs, _ = projected.split(sizes.parts(), dim=-1)
        window = exchange.windows(inputs, conv_weight.shape[1] - 1)
        convolved, final, factor = _leaving(
            projected, conv_weight, conv_bias, A_log, dt_bias, starts, window, *ctx.settings
        )
        initial, passed = exchange.states(final, factor)
        weights = norm_weight, out_weight
        out, *kept = _entered(
            projected, convolved, A_log, D, dt_bias, *weights, starts, initial, *ctx.settings, keep_states
        )
        given = projected, conv_weight, conv_bias, A_log, D, dt_bias, *weights, starts
        ctx.save_for_backward(*given, window, initial, passed, *kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        *given, window, initial, passed, reciprocal, y, entering = ctx.saved_tensors
        projected, conv_weight, conv_bias, A_log, D, dt_bias, _, out_weight, starts = given
        place = (None, False) if ctx.total is None else ctx.total.take()
        d_projected, d_y, d_initial, convolved, made, d_norm_weight, d_out_weight = _entered_backward(
            d_out, *given, window, initial, reciprocal, y, entering, *ctx.settings, *place
        )
        del y
        d_final = ctx.exchange.states_back(d_initial, passed)
        d_taps, d_heads, d_window = _leaving_backward(
            d_projected, d_y, d_final, projected, convolved, conv_weight, conv_bias, A_log, D, dt_bias, starts, window,
            entering if entering.numel() else made, *ctx.settings,
        )  # fmt: skip
        d_tails = ctx.exchange.windows_back(d_window)
        sizes = MixerSizes.of(*ctx.settings[:2])
        _, d_inputs, _ = d_projected.split(sizes.parts(), dim=-1)
        d_inputs[:, d_inputs.shape[1] - d_tails.shape[1] :] += d_tails
        d_weights = (*split_taps(d_taps, conv_weight, conv_bias), *split_heads(d_heads, D, dt_bias).values())
        into_out = None if out_weight is None or ctx.total is not None else d_out_weight
        return d_projected, *d_weights, d_norm_weight, into_out, *(None,) * 6


@disable_compile
def mix_segments(
    projected_RLX: Tensor,
    conv_weight_CW: Tensor,
    conv_bias_C: Tensor | None,
    A_log_H: Tensor,
    D_H: Tensor,
    dt_bias_H: Tensor,
    norm_weight_I: Tensor,
    out_weight_DI: Tensor | None,
    starts_RL: Tensor | None,
    sizes: MixerSizes,
    chunk_size: int,
    keep_states: bool,
    exchange: Exchange,
) -> Tensor:
    """As `triton_impl.mix_triton`, of R segments of L tokens; every rank of the exchange must call, in both directions."""
    out: Tensor = _MixSegments.apply(
        projected_RLX, conv_weight_CW, conv_bias_C, A_log_H, D_H, dt_bias_H, norm_weight_I, out_weight_DI, starts_RL,
        sizes, chunk_size, keep_states, exchange, gradient_sum_of(out_weight_DI),
    )  # fmt: skip
    return out
