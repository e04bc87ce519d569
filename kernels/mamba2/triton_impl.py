"""Mamba2's mixer as one custom operation each way, out of the kernels of its parts.

Forward: convolution, walk, norm, product. Kept: the projection, one number per row and group of the norm, and where asked y
before the norm and the states that enter chunks. Backward: convolution again, and the walk where its results were not kept;
the norm's gradient, which also writes the normed rows again for the weight of the product; the scan's walk back; the
convolution's gradient (passes.py). Rows that are segments of longer ones take another way (segments.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from amfm.kernels.causal_conv1d.triton_impl import split_taps
from amfm.kernels.common.custom_op import differentiate, fake_of
from amfm.kernels.common.limits import DECAY_LIMITS
from amfm.kernels.common.scan_launch import differentiated
from amfm.kernels.mamba2.passes import (
    Rows,
    mixed_like,
    norm_gradients_like,
    scan_gradients_like,
    split_heads,
)
from amfm.kernels.mamba2.rank_part import Exchange, MixerSizes
from amfm.kernels.mamba2.segments import mix_segments
from amfm.kernels.norm.triton_impl import LARGEST_GROUP
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
    exchange: Exchange | None = None,
) -> Tensor:
    """As `reference.mix_by_steps`, for float32, bfloat16 and float16; without an output weight the normed rows [B, T, I].

    Raises ValueError for sizes without a kernel, which are those of the scan and of the norm.
    """
    dot_dtype(projected_BTX.dtype)  # rejects float64
    DECAY_LIMITS.check(chunk_size, sizes.state, sizes.head_dim)
    if sizes.inner // sizes.norm_groups > LARGEST_GROUP:
        size = sizes.inner // sizes.norm_groups
        raise ValueError(f'backend "triton" norms groups of up to {LARGEST_GROUP} values; got {size}')
    tensors = (projected_BTX, conv_weight_CW, conv_bias_C, A_log_H, D_H, dt_bias_H, norm_weight_I, out_weight_DI)
    keep_states = keep_states and differentiated(*(tensor for tensor in tensors if tensor is not None))
    chunk = min(chunk_size, DECAY_LIMITS.chunk_sizes[-1])
    starts = None if document_starts_BT is None else document_starts_BT.contiguous()
    if exchange is not None:
        return mix_segments(*tensors, starts, sizes, chunk, keep_states, exchange)
    return _forward(*tensors, starts, sizes.numbers, sizes.epsilon, chunk, keep_states)[0]


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
    rows = Rows.of(projected, conv_weight, conv_bias, A_log, dt_bias, starts, sizes, chunk_size)
    return rows.mix(D, norm_weight, out_weight, keep_states)


@fake_of(_forward)
def _(given: Any) -> tuple[Tensor, ...]:
    return mixed_like(given)


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
    order, in the dtype of A_log), of the norm's weight, and of the output's, which is empty if it lands or is absent.
    """
    sizes, d_projected = MixerSizes.of(numbers, epsilon), projected.new_empty(projected.shape)
    rows = Rows.of(projected, conv_weight, conv_bias, A_log, dt_bias, starts, sizes, chunk_size)
    y, entering = rows.recompute(D, y, entering)
    weights = norm_weight, out_weight
    d_y, d_norm, d_weight = rows.norm_back(d_out, y, reciprocal, *weights, d_projected, out_weight_sum, out_weight_adds)
    del y
    d_taps, d_heads, _ = rows.scan_back(D, entering, d_y, None, conv_weight, conv_bias, None, d_projected)
    return d_projected, d_taps, d_heads, d_norm, d_weight


@fake_of(_backward)
def _(given: Any) -> tuple[Tensor, ...]:
    return given.projected.new_empty(given.projected.shape), *scan_gradients_like(given), *norm_gradients_like(given)


def _unpack(results: tuple[Tensor, ...], kept: Any) -> dict[str, Tensor | None]:
    d_projected, d_taps, d_heads, d_norm_weight, d_out_weight = results
    d_weight, d_bias = split_taps(d_taps, kept.conv_weight, kept.conv_bias)
    return {
        "projected": d_projected,
        "conv_weight": d_weight,
        "conv_bias": d_bias,
        **split_heads(d_heads, kept.D, kept.dt_bias),
        "norm_weight": d_norm_weight,
        "out_weight": None if kept.out_weight is None else d_out_weight,
    }


differentiate(_forward, _backward, outputs=("out", "reciprocal", "y", "entering"), unpack=_unpack)
