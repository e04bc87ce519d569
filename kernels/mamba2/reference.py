"""Mamba2's mixer after its first projection as it is defined, one token at a time, in any dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from amfm.kernels.causal_conv1d.reference import convolve_by_steps
from amfm.kernels.decay_scan.reference import mamba2_by_steps
from amfm.kernels.mamba2.sizes import MixerSizes
from amfm.kernels.norm.reference import normalize_gated


def mix_by_steps(
    projected_BTX: Tensor,
    conv_weight_CW: Tensor,
    conv_bias_C: Tensor | None,
    A_log_H: Tensor,
    D_H: Tensor,
    dt_bias_H: Tensor,
    norm_weight_I: Tensor,
    out_weight_DI: Tensor,
    sizes: MixerSizes,
    document_starts_BT: Tensor | None,
) -> Tensor:
    """z, x, B, C, dt of the projection; convolution of x, B and C; scan; norm of y silu(z); product with the output's weight."""
    z_BTI, inputs_BTC, dt_BTH = projected_BTX.split(sizes.parts(), dim=-1)
    convolved_BTC = convolve_by_steps(inputs_BTC, conv_weight_CW, conv_bias_C, document_starts_BT, None)
    x, B, C = sizes.split(convolved_BTC)
    y_BTHP, _, _ = mamba2_by_steps(x, dt_BTH, A_log_H, B, C, D_H, dt_bias_H, document_starts_BT, None)
    normed_BTI = normalize_gated(y_BTHP.flatten(-2), z_BTI, norm_weight_I, sizes.epsilon, sizes.norm_groups)
    return torch.nn.functional.linear(normed_BTI, out_weight_DI)
