"""Normalization and rotation of heads, one pair of channels at a time: the meaning the fast paths must keep."""

from __future__ import annotations

import torch
from torch import Tensor


def norm_rope_reference(
    x_BTHK: Tensor,
    positions_BT: Tensor,
    inverse_frequencies: Tensor | None,
    attention_factor: float,
    weight_K: Tensor | None,
    epsilon: float,
) -> Tensor:
    """RMSNorm over each head (without weight: none), then channel i and i + d/2 rotate by position * frequency i.

    x [B, T, H, K], positions [B, T], frequencies [d/2] with d <= K, weight [K] -> [B, T, H, K] in the dtype of
    x. Source: Su et al. 2021 (arXiv 2104.09864), section 3.4.2, with the halves of a head paired instead of
    neighbours.
    """
    if weight_K is not None:
        x_BTHK = x_BTHK / (x_BTHK.square().mean(-1, keepdim=True) + epsilon).sqrt() * weight_K
    if inverse_frequencies is None:
        return x_BTHK
    half = inverse_frequencies.shape[0]
    channels = list(x_BTHK.unbind(-1))
    for pair, frequency in enumerate(inverse_frequencies.to(x_BTHK.dtype)):
        angle = (positions_BT.to(x_BTHK.dtype) * frequency)[:, :, None]
        cosine, sine = angle.cos() * attention_factor, angle.sin() * attention_factor
        first, second = x_BTHK[..., pair], x_BTHK[..., pair + half]
        channels[pair] = first * cosine - second * sine
        channels[pair + half] = second * cosine + first * sine
    return torch.stack(channels, dim=-1)
