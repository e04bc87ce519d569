"""Rotary positions, fused with the normalization of queries and keys, and their frequencies.

How: norm and rotation are fused because each on its own reads and writes all of q and k. Queries and keys go through
one at a time, with cosine and sine computed once for both from positions, so that packed documents and context
ranks may bring their own positions. PyTorch's form has its backward written out, so that only the input is kept.
`norm_rope_reference` is the definition, one pair of channels at a time.

Channel i turns with channel i + d/2 rather than with its neighbor, so that a rotation is two contiguous halves
and no shuffle; as Hugging Face checkpoints of the Llama family do.

Frequencies may be stretched to texts longer than the model was trained on. "ntk" raises the base, so that with alpha as the
ratio of lengths the slowest pair turns as far over the longer
text as it did over the shorter, and fast pairs hardly change. "yarn" and "llama3" treat pairs by how often they turn over
the trained length: fast ones tell neighbours apart and stay, slow ones would reach angles never trained and are
slowed down. "llama3" is what Llama 3.1 and later were trained with: its ramp is linear in the turns, yarn's in the number
of the pair, and it has no factor on the scores.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from amfm.kernels.common.inputs import check_float, check_shape
from amfm.kernels.runtime.backend import resolve_backend

__all__ = ["qk_norm_rope", "rope_frequencies"]


def qk_norm_rope(
    q_BTHK: Tensor,
    k_BTJK: Tensor,
    positions_BT: Tensor,
    inverse_frequencies: Tensor | None,
    attention_factor: float,
    *,
    q_weight_K: Tensor | None = None,
    k_weight_K: Tensor | None = None,
    epsilon: float = 1e-5,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """RMSNorm over each query and key head, then the rotation of channel i against i + d/2 by position * frequency i.

    Shapes: q [B, T, H, K], k [B, T, J, K], positions [B, T] integers, frequencies [d/2] with d <= K (channels from d
    on pass through), weights [K] -> (q, k). Weights None: no norm; frequencies None: no rotation. The attention
    factor multiplies cosine and sine. In float32 inside (float64 for float64); saves only the inputs.
    Raises ValueError for wrong shapes and dtypes.
    Source: Su et al. 2021 (arXiv 2104.09864), section 3.4.2; Dehghani et al. 2023 (arXiv 2302.05442), section 2, QK-norm.
    """
    _check(q_BTHK, k_BTJK, positions_BT, inverse_frequencies, q_weight_K, k_weight_K)
    backend = resolve_backend(backend, q_BTHK.device, "rope")
    if backend == "reference":
        rest = (positions_BT, inverse_frequencies, attention_factor)
        return (
            norm_rope_reference(q_BTHK, *rest, q_weight_K, epsilon),
            norm_rope_reference(k_BTJK, *rest, k_weight_K, epsilon),
        )
    cosine = sine = None
    if inverse_frequencies is not None:
        dtype = torch.promote_types(q_BTHK.dtype, torch.float32)
        cosine, sine = angles_of(positions_BT, inverse_frequencies, attention_factor, dtype)
    if backend == "triton":
        from amfm.kernels.rope.triton_impl import norm_rope_triton as norm_rope
    else:
        norm_rope = norm_rope_torch
    return (
        norm_rope(q_BTHK, cosine, sine, q_weight_K, epsilon),
        norm_rope(k_BTJK, cosine, sine, k_weight_K, epsilon),
    )


def _check(
    q_BTHK: Tensor,
    k_BTJK: Tensor,
    positions_BT: Tensor,
    inverse_frequencies: Tensor | None,
    q_weight_K: Tensor | None,
    k_weight_K: Tensor | None,
) -> None:
    """Raise ValueError for shapes or dtypes that do not fit.

    Frequencies may rotate fewer channels than a head has, never more.
    """
    check_shape("q_BTHK", q_BTHK, (-1, -1, -1, -1))
    batch, tokens, _, size = q_BTHK.shape
    check_float("q_BTHK", q_BTHK)
    check_shape("k_BTJK", k_BTJK, (batch, tokens, -1, size), q_BTHK, "q_BTHK")
    check_float("k_BTJK", k_BTJK, q_BTHK)
    check_shape("positions_BT", positions_BT, (batch, tokens), q_BTHK)
    if positions_BT.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"positions_BT must be int32 or int64; got {positions_BT.dtype}")
    for name, weight in (("q_weight_K", q_weight_K), ("k_weight_K", k_weight_K)):
        if weight is not None:
            check_shape(name, weight, (size,), q_BTHK)
            check_float(name, weight)
    if inverse_frequencies is not None:
        check_shape("inverse_frequencies", inverse_frequencies, (-1,), q_BTHK)
        if 2 * inverse_frequencies.shape[0] > size:
            raise ValueError(
                f"inverse_frequencies rotate 2 * {inverse_frequencies.shape[0]} channels; heads have only {size}"
            )


def qk_norm_rope_bytes(tokens: int, heads: int, head_dim: int, size: int, *, backward: bool) -> int:
    """Least bytes over query and key heads: read and write; backward with a norm reads the input again.

    `tokens` counts those of all rows, `size` is the bytes of one number.
    """
    return tokens * heads * head_dim * size * (3 if backward else 2)


def qk_norm_rope_flops(tokens: int, heads: int, head_dim: int, *, backward: bool) -> int:
    """Floating point operations: about 7 a channel in forward and 12 in backward."""
    return tokens * heads * head_dim * (12 if backward else 7)


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


class Llama3Numbers(NamedTuple):
    """Llama 3's stretch: pairs that turn fewer than `slow_turns` times over the trained length are divided by `factor`, those
    that turn more than `fast_turns` times are kept."""

    factor: float
    original_length: int
    slow_turns: float = 1.0
    fast_turns: float = 4.0


def rope_frequencies(
    head_dim: int,
    *,
    theta: float,
    fraction: float = 1.0,
    scaling: str = "none",
    ntk_alpha: float | None = None,
    yarn_factor: float | None = None,
    yarn_original_length: int | None = None,
    yarn_beta_fast: float = 32.0,
    yarn_beta_slow: float = 1.0,
    yarn_truncate: bool = True,
    llama3: Llama3Numbers | None = None,
    linear_factor: float | None = None,
) -> tuple[Tensor, float]:
    """Angle a token of each rotated pair of channels, float32 on CPU, and the factor on cosine and sine.

    d = int(head_dim * fraction) channels are rotated, so there are d / 2 angles.
    `scaling`: "none" theta^(-2i/d); "linear" that divided by `linear_factor`; "ntk" theta becomes theta * alpha^(d/(d-2)); "yarn" frequencies that turn fewer
    than `yarn_beta_slow` times over the trained length are divided by `yarn_factor`, those above `yarn_beta_fast`
    are kept, and between them a ramp mixes both, whose ends are rounded outwards to whole pairs if `yarn_truncate`; "llama3" as `Llama3Numbers` says.

    Raises ValueError for an odd number of rotated channels, a missing setting, or one that another scaling reads.
    Source: Su et al. 2021 (arXiv 2104.09864), section 3.4.2; Peng et al. 2023 (arXiv 2309.00071), sections 3.1 to 3.4.
    """
    dim = int(head_dim * fraction)
    _check_scaling(head_dim, dim, theta, scaling, ntk_alpha, yarn_factor, yarn_original_length)
    if (scaling == "llama3") != (llama3 is not None):
        raise ValueError(f"scaling=llama3 needs llama3, and nothing else reads it; got {scaling=}, {llama3=}")
    if (scaling == "linear") != (linear_factor is not None):
        raise ValueError(
            f"scaling=linear needs linear_factor, and nothing else reads it; got {scaling=}, {linear_factor=}"
        )
    if scaling == "ntk":
        assert ntk_alpha is not None, "checked above"
        theta = theta * ntk_alpha ** (dim / (dim - 2))
    exponents = torch.arange(0, dim, 2, dtype=torch.float32) / dim
    frequencies = 1.0 / theta**exponents
    if linear_factor is not None:
        return frequencies / linear_factor, 1.0
    if llama3 is not None:
        turns = llama3.original_length * frequencies / (2 * math.pi)
        kept = ((turns - llama3.slow_turns) / (llama3.fast_turns - llama3.slow_turns)).clamp(0, 1)
        return frequencies * kept + frequencies / llama3.factor * (1 - kept), 1.0
    if scaling != "yarn":
        return frequencies, 1.0
    assert yarn_factor is not None and yarn_original_length is not None, "checked above"
    low, high = (
        _pair_that_turns(turns, dim, theta, yarn_original_length) for turns in (yarn_beta_fast, yarn_beta_slow)
    )
    if yarn_truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = high - low if high != low else 1e-3
    stretched = ((torch.arange(dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    mixed = frequencies / yarn_factor * stretched + frequencies * (1 - stretched)
    # More keys flatten the softmax; the factor on q and k sharpens it again (section 3.4).
    return mixed, 0.1 * math.log(yarn_factor) + 1.0 if yarn_factor > 1 else 1.0


def _pair_that_turns(rotations: float, dim: int, theta: float, length: int) -> float:
    """Index (a real number) of the pair of channels that turns `rotations` times over `length` tokens."""
    return dim * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(theta))


def _check_scaling(
    head_dim: int,
    dim: int,
    theta: float,
    scaling: str,
    ntk_alpha: float | None,
    yarn_factor: float | None,
    yarn_original_length: int | None,
) -> None:
    """Raise ValueError for settings that do not go together or that no scaling reads."""
    if not 0 < dim <= head_dim or dim % 2:
        raise ValueError(f"head_dim * fraction must be even and in 1..head_dim; got {dim} of head_dim={head_dim}")
    if theta <= 1:
        raise ValueError(f"theta must be above 1; got {theta}")
    if scaling not in ("none", "linear", "ntk", "yarn", "llama3"):
        raise ValueError(f"scaling must be none, linear, ntk, yarn or llama3; got {scaling!r}")
    if (scaling == "ntk") != (ntk_alpha is not None):
        raise ValueError(f"scaling=ntk needs ntk_alpha, and nothing else reads it; got {scaling=}, {ntk_alpha=}")
    if scaling == "ntk" and dim <= 2:
        raise ValueError(f"scaling=ntk needs more than 2 rotated channels; got {dim}")
    for name, value in (("yarn_factor", yarn_factor), ("yarn_original_length", yarn_original_length)):
        if (scaling == "yarn") != (value is not None):
            raise ValueError(f"scaling=yarn needs {name}, and nothing else reads it; got {scaling=}, {name}={value}")
