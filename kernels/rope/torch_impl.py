"""Normalization and rotation of heads in PyTorch, with backward written out so that only the input is kept.

Channel i turns with channel i + d/2 rather than with its neighbour, so that a rotation is two contiguous halves
and no shuffle; as Hugging Face checkpoints of the Llama family do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def angles_of(
    positions_BT: Tensor, inverse_frequencies: Tensor, attention_factor: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosine and sine [B, T, 1, d/2] times the attention factor, in `dtype`.

    Angles are products of a position with a frequency in float32 (float64 for float64): in bfloat16 positions
    above 256 would collide.
    """
    angles = (positions_BT.to(dtype)[:, :, None] * inverse_frequencies.to(dtype))[:, :, None]
    return angles.cos() * attention_factor, angles.sin() * attention_factor


def _rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Turn channel i against i + d/2; channels from d on pass through."""
    half = cosine.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine, rest), dim=-1)


def _compose(x: Tensor, cosine: Tensor | None, sine: Tensor | None, weight: Tensor | None, epsilon: float) -> Tensor:
    """The whole operation as plain PyTorch, for compilers."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if weight is not None:
        wide = wide * (wide.square().mean(-1, keepdim=True) + epsilon).rsqrt() * weight
    if cosine is not None and sine is not None:
        wide = _rotate(wide, cosine, sine)
    return wide.to(x.dtype)


class _NormRope(torch.autograd.Function):
    """Backward turns the gradient back (the angle negated), then goes through the norm.

    The transpose of the rotation is its inverse up to the attention factor, which cosine and sine hold, so only
    the sine changes sign. Saves x, cosine and sine.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, cosine: Tensor | None, sine: Tensor | None, weight: Tensor | None, epsilon: float
    ) -> Tensor:
        ctx.save_for_backward(x, cosine, sine, weight)
        ctx.epsilon = epsilon
        return _compose(x, cosine, sine, weight, epsilon)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, cosine, sine, weight = ctx.saved_tensors
        wide_dtype = torch.promote_types(x.dtype, torch.float32)
        grad = grads[0].to(wide_dtype)
        if cosine is not None:
            grad = _rotate(grad, cosine, -sine)
        if weight is None:
            return grad.to(x.dtype), None, None, None, None
        wide = x.to(wide_dtype)
        inverse_rms = (torch.linalg.vecdot(wide, wide)[..., None] / wide.shape[-1] + ctx.epsilon).rsqrt()
        unit = wide * inverse_rms
        d_weight = (grad * unit).flatten(0, -2).sum(0)
        grad = grad * weight
        # The part of the gradient along x itself, which a norm takes away.
        slope = torch.linalg.vecdot(grad, unit)[..., None] / wide.shape[-1]
        dx = grad.addcmul_(unit, slope, value=-1).mul_(inverse_rms)
        return dx.to(x.dtype), None, None, d_weight.to(weight.dtype), None


def norm_rope_torch(
    x_BTHK: Tensor, cosine: Tensor | None, sine: Tensor | None, weight_K: Tensor | None, epsilon: float
) -> Tensor:
    """As `norm_rope_reference`, given cosine and sine, in float32 inside (float64 for float64)."""
    if weight_K is None and cosine is None:
        return x_BTHK
    if torch.compiler.is_compiling():
        return _compose(x_BTHK, cosine, sine, weight_K, epsilon)
    return _NormRope.apply(x_BTHK, cosine, sine, weight_K, epsilon)
