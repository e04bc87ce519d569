"""Rotary positions, fused with the normalization of queries and keys.

How: norm and rotation are fused because each on its own reads and writes all of q and k. Queries and keys go through
one at a time, with cosine and sine computed once for both from positions, so that packed documents and context
ranks may bring their own positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from amfm.kernels.common.inputs import check_float, check_shape
from amfm.kernels.rope.frequencies import rope_frequencies
from amfm.kernels.rope.reference import norm_rope_reference
from amfm.kernels.rope.torch_impl import angles_of, norm_rope_torch
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
