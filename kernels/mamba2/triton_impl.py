"""Mamba2's mixer as one custom operation each way, out of the kernels of its parts.

Forward: convolution, walk, norm, product. Kept: the projection, one number a row and group of the norm, and where asked y
before the norm and the states that enter chunks. Backward: convolution again, and the walk where its results were not kept;
the norm's gradient, which also writes the normed rows again for the weight of the product; the scan's walk back; the
convolution's gradient. Gradients of z, x, B, C and dt are written where they lie in the gradient of the projection, so that
nothing is copied together.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from amfm.kernels.causal_conv1d.triton_impl import convolve_rows, convolve_rows_backward, split_taps
from amfm.kernels.common.custom_op import differentiate, fake_of, lands
from amfm.kernels.common.gradient_sum import add_outer
from amfm.kernels.common.limits import DECAY_LIMITS
from amfm.kernels.common.partial_sums import sum_first, sum_parts
from amfm.kernels.common.scan_launch import differentiated
from amfm.kernels.decay_scan.launch import DecayLaunch, Gates, find_gradients, walk, walk_back
from amfm.kernels.linear.op import linear
from amfm.kernels.mamba2.sizes import MixerSizes
from amfm.kernels.norm.triton_impl import LARGEST_GROUP, norm_rows, norm_rows_backward
from amfm.kernels.runtime.interpreter import dot_dtype


def mix_triton(
    projected_BTX: Tensor,
    conv_weight_CW: Tensor,
    conv_bias_C: Tensor | None,
    A_log_H: Tensor,
    D_H: Tensor,
    dt_bias_H: Tensor,
    norm_weight_I: Tensor,
    out_weight_DI: Tensor | None,
    sizes: MixerSizes,
    document_starts_BT: Tensor | None,
    chunk_size: int,
    keep_states: bool,
) -> Tensor:
    """As `reference.mix_by_steps`, for float32, bfloat16 and float16; without an output weight the normed rows [B, T, I].

    Raises ValueError for sizes without a kernel, which are those of the scan and of the norm.
    """
    dot_dtype(projected_BTX.dtype)  # refuses float64
    DECAY_LIMITS.check(chunk_size, sizes.state, sizes.head_dim)
    if sizes.inner // sizes.norm_groups > LARGEST_GROUP:
        size = sizes.inner // sizes.norm_groups
        raise ValueError(f'backend "triton" norms groups of up to {LARGEST_GROUP} values; got {size}')
    tensors = (projected_BTX, conv_weight_CW, conv_bias_C, A_log_H, D_H, dt_bias_H, norm_weight_I, out_weight_DI)
    keep_states = keep_states and differentiated(*(tensor for tensor in tensors if tensor is not None))
    chunk = min(chunk_size, DECAY_LIMITS.chunk_sizes[-1])
    starts = None if document_starts_BT is None else document_starts_BT.contiguous()
    numbers = (sizes.heads, sizes.head_dim, sizes.groups, sizes.state, sizes.norm_groups)
    return _forward(*tensors, starts, list(numbers), sizes.epsilon, chunk, keep_states)[0]


@torch.library.custom_op("amfm::mamba2_triton", mutates_args=())
def _forward(
    projected: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    A_log: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    norm_weight: Tensor,
    out_weight: Tensor | None,
    starts: Tensor | None,
    numbers: list[int],
    epsilon: float,
    chunk_size: int,
    keep_states: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output, the norm's r, and what is empty unless kept: y before the norm [B, T, I], the states that enter chunks."""
    sizes = MixerSizes.of(numbers, epsilon)
    z, inputs, dt = projected.split(sizes.parts(), dim=-1)
    x, B, C = sizes.split(convolve_rows(inputs, conv_weight, conv_bias, starts))
    launch = DecayLaunch.of(C, x, chunk_size, 0)
    y = projected.new_empty(*projected.shape[:2], sizes.inner)
    entering = launch.chunk_states(y) if keep_states else None
    walk(launch, C, B, x, Gates(dt, None, A_log, dt_bias), D, starts, None, y, entering)
    normed, _, reciprocal = norm_rows(y, z, norm_weight, sizes.epsilon, sizes.norm_groups, gated=True)
    out = normed if out_weight is None else linear(normed, out_weight)
    return out, reciprocal, *((y.new_empty(0), y.new_empty(0)) if entering is None else (y, entering))


@fake_of(_forward)
def _(given: Any) -> tuple[Tensor, ...]:
    sizes, projected = MixerSizes.of(given.numbers, given.epsilon), given.projected
    rows, tokens, _ = projected.shape
    chunks = (tokens + given.chunk_size - 1) // given.chunk_size
    states = (rows, chunks, sizes.heads, sizes.state, sizes.head_dim)
    return (
        projected.new_empty(rows, tokens, sizes.inner if given.out_weight is None else len(given.out_weight)),
        projected.new_empty(rows * tokens, sizes.norm_groups, dtype=torch.float32),
        projected.new_empty((rows, tokens, sizes.inner) if given.keep_states else (0,)),
        projected.new_empty(states if given.keep_states else (0,)),
    )


@torch.library.custom_op("amfm::mamba2_triton_backward", mutates_args=("out_weight_sum",))
def _backward(
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
    reciprocal: Tensor,
    y: Tensor,
    entering: Tensor,
    numbers: list[int],
    epsilon: float,
    chunk_size: int,
    out_weight_sum: Tensor | None,
    out_weight_adds: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the projection, of the convolution's weight and bias as one, of A_log, dt_bias and D [3, H] (in this
    order, in the dtype of A_log), of the norm's weight, and of the output's, which is empty where it lands or is absent.
    """
    sizes, d_out = MixerSizes.of(numbers, epsilon), d_out.contiguous()
    z, inputs, dt = projected.split(sizes.parts(), dim=-1)
    d_projected = projected.new_empty(projected.shape)
    d_z, d_inputs, d_dt = d_projected.split(sizes.parts(), dim=-1)
    convolved = convolve_rows(inputs, conv_weight, conv_bias, starts)
    x, B, C = sizes.split(convolved)
    launch = DecayLaunch.of(C, x, chunk_size, 0)
    gates = Gates(dt, None, A_log, dt_bias)
    if not entering.numel():
        y = projected.new_empty(*projected.shape[:2], sizes.inner)
        entering = launch.chunk_states(y)
        walk(launch, C, B, x, gates, D, starts, None, y, entering)
    d_normed = d_out if out_weight is None else linear(d_out, out_weight.t())
    d_y, normed = torch.empty_like(y), torch.empty_like(y)
    d_norm_weight = norm_rows_backward(d_normed, None, y, z, norm_weight, reciprocal, d_y, d_z, normed)
    del d_normed
    if out_weight is None:
        d_out_weight = d_out.new_empty(0)
    elif out_weight_sum is None:
        d_out_weight = linear(d_out.flatten(0, -2).t(), normed.flatten(0, -2).t()).to(out_weight.dtype)
    else:
        add_outer(out_weight_sum, out_weight_adds, d_out.flatten(0, -2), normed.flatten(0, -2))
        d_out_weight = out_weight.new_empty(0)
    del normed, y
    d_y = d_y.view(x.shape)
    leaving, _ = walk_back(launch, C, gates, starts, d_y, None)
    d_convolved = convolved.new_empty(convolved.shape)
    d_x, d_B, d_C = sizes.split(d_convolved)
    # Several programs share a group's heads: their parts are added in float32, B and C at once, because they are neighbours.
    parts = (
        None if launch.splits == 1 else d_y.new_empty(launch.splits, *B.shape[:2], 2, *B.shape[2:], dtype=torch.float32)
    )
    into_B, into_C = (d_B[None], d_C[None]) if parts is None else parts.unbind(3)
    d_heads = find_gradients(
        launch, C, B, x, gates, D, starts, (entering, leaving), d_y, into_C, into_B, d_x, d_dt, None
    )
    if parts is not None:
        shared = d_convolved.flatten(0, 1)[:, sizes.inner :]
        sum_parts(parts.view(launch.splits, len(shared), -1), shared)
    d_taps, _ = convolve_rows_backward(d_convolved, inputs, conv_weight, conv_bias, starts, d_inputs)
    return d_projected, d_taps, sum_first(d_heads, A_log.dtype), d_norm_weight, d_out_weight


@fake_of(_backward)
def _(given: Any) -> tuple[Tensor, ...]:
    conv_weight, A_log = given.conv_weight, given.A_log
    return (
        given.projected.new_empty(given.projected.shape),
        conv_weight.new_empty(conv_weight.numel() + len(conv_weight)),
        A_log.new_empty(3, len(A_log)),
        given.norm_weight.new_empty(given.norm_weight.shape),
        given.norm_weight.new_empty(0)
        if given.out_weight is None
        else given.out_weight.new_empty(0 if lands(given, "out_weight") else given.out_weight.shape),
    )


def _unpack(results: tuple[Tensor, ...], kept: Any) -> dict[str, Tensor | None]:
    d_projected, d_taps, d_heads, d_norm_weight, d_out_weight = results
    d_weight, d_bias = split_taps(d_taps, kept.conv_weight, kept.conv_bias)
    d_A_log, d_dt_bias, d_D = d_heads.unbind(0)
    return {
        "projected": d_projected,
        "conv_weight": d_weight,
        "conv_bias": d_bias,
        "A_log": d_A_log,
        "D": d_D.to(kept.D.dtype),
        "dt_bias": d_dt_bias.to(kept.dt_bias.dtype),
        "norm_weight": d_norm_weight,
        "out_weight": None if kept.out_weight is None else d_out_weight,
    }


differentiate(_forward, _backward, outputs=("out", "reciprocal", "y", "entering"), unpack=_unpack)
