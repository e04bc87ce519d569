"""Root-mean-square norms: plain, with a residual added first, and gated over groups as Mamba-2 uses it.

How: `torch_impl.py` has the formulas, and walks blocks of rows that fit a core's cache with a backward
written out; `triton_impl.py` reads and writes each value once. All take means in float32: in bfloat16 the sum
of a few thousand squares would lose the small ones.
"""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor
from torch.nn import functional

from amfm.kernels.common.inputs import check_float, check_shape
from amfm.kernels.norm.torch_impl import gated_rms_norm_torch, normalize, normalize_gated, rms_norm_torch
from amfm.kernels.runtime.backend import resolve_backend


@overload
def rms_norm(x: Tensor, weight: Tensor, epsilon: float, *, residual: None = None, backend: str = "auto") -> Tensor: ...


@overload
def rms_norm(
    x: Tensor, weight: Tensor, epsilon: float, *, residual: Tensor, backend: str = "auto"
) -> tuple[Tensor, Tensor]: ...


def rms_norm(
    x: Tensor, weight: Tensor, epsilon: float, *, residual: Tensor | None = None, backend: str = "auto"
) -> Tensor | tuple[Tensor, Tensor]:
    """y = h / sqrt(mean(h^2) + epsilon) * weight over the last dim, with h = x, or x + residual where that is given.

    x and residual [..., D] in one dtype, weight [D]. Means are float32 (float64 for float64 inputs).

    Returns y in the dtype of x; with a residual (y, h). Raises ValueError for shapes, dtypes or devices that do not
    fit. Source: Zhang and Sennrich 2019, arXiv 1910.07467.
    """
    check_rows("x", x, weight, epsilon)
    if residual is not None:
        check_shape("residual", residual, tuple(x.shape), x)
        check_float("residual", residual, x)
    if backend == "native":
        from amfm.kernels.common.few_rows import rms_norm_rows, takes_few_rows

        if takes_few_rows(x, weight):
            y, h = rms_norm_rows(x, weight, epsilon, residual)
            return y if residual is None else (y, h)
    backend = resolve_backend(backend, x.device, "norm")
    if backend == "triton":
        from amfm.kernels.norm.triton_impl import rms_norm_triton

        y, h = rms_norm_triton(x, weight, epsilon, residual)
        return y if residual is None else (y, h)
    # Rounded to the dtype of x before it is normed, in every backend alike: h is what the residual stream
    # carries on, so the norm is that of the rounded sum.
    h = x if residual is None else x + residual
    if backend == "reference":
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        y = normalize(h.to(wide), weight.to(wide), epsilon).to(x.dtype)
    else:
        y = rms_norm_torch(h, weight, epsilon)
    return y if residual is None else (y, h)


def gated_rms_norm(
    y: Tensor, z: Tensor, weight: Tensor, epsilon: float, *, num_groups: int = 1, backend: str = "auto"
) -> Tensor:
    """The norm of y silu(z), taken over each of `num_groups` equal parts of the last dim, times the weight.

    y and z [..., D] in one dtype, weight [D]; num_groups divides D. Means are float32 (float64 for float64 inputs).

    Returns [..., D] in the dtype of y. Raises ValueError for shapes, dtypes, devices or groups that do not fit.
    Source: Dao and Gu 2024, arXiv 2405.21060, section 7.
    """
    check_rows("y", y, weight, epsilon)
    check_shape("z", z, tuple(y.shape), y)
    check_float("z", z, y)
    if num_groups < 1 or y.shape[-1] % num_groups:
        raise ValueError(f"num_groups must divide the last dim of y, {y.shape[-1]}; got {num_groups}")
    backend = resolve_backend(backend, y.device, "norm")
    if backend == "reference":
        wide = torch.float64 if y.dtype == torch.float64 else torch.float32
        return normalize_gated(y.to(wide), z.to(wide), weight.to(wide), epsilon, num_groups).to(y.dtype)
    if backend == "triton":
        from amfm.kernels.norm.triton_impl import gated_rms_norm_triton

        return gated_rms_norm_triton(y, z, weight, epsilon, num_groups)
    return gated_rms_norm_torch(y, z, weight, epsilon, num_groups)


def head_norm(
    o_BTHV: Tensor,
    gate_BTI: Tensor | None,
    weight_V: Tensor,
    epsilon: float,
    *,
    act: Literal["silu", "sigmoid"] = "silu",
    backend: str = "auto",
) -> Tensor:
    """The norm of each head of o [B, T, H, V], with one weight [V] for all, times act(gate) [B, T, H V] where there is one.

    Returns [B, T, H V] in the dtype of o. Triton takes norm and gate in one pass and rounds once; the others round the norm
    before the gate, which is taken in float32 for bf16. Raises ValueError for shapes, dtypes or devices that do not fit.
    """
    check_shape("o_BTHV", o_BTHV, (-1, -1, -1, -1))
    check_rows("o_BTHV", o_BTHV, weight_V, epsilon)
    if gate_BTI is not None:
        check_shape("gate_BTI", gate_BTI, (*o_BTHV.shape[:2], o_BTHV.shape[2] * o_BTHV.shape[3]), o_BTHV)
        check_float("gate_BTI", gate_BTI, o_BTHV)
    if resolve_backend(backend, o_BTHV.device, "norm") == "triton" and o_BTHV.numel():
        from amfm.kernels.norm.heads import head_norm_triton

        return head_norm_triton(o_BTHV, gate_BTI, weight_V, epsilon, "none" if gate_BTI is None else act)
    normed_BTI = rms_norm(o_BTHV.contiguous(), weight_V, epsilon, backend=backend).flatten(-2)
    if gate_BTI is None:
        return normed_BTI
    wide = torch.promote_types(gate_BTI.dtype, torch.float32)
    gate = gate_BTI.to(wide)
    return (normed_BTI.to(wide) * (functional.silu(gate) if act == "silu" else gate.sigmoid())).to(o_BTHV.dtype)


def check_rows(name: str, x: Tensor, weight: Tensor, epsilon: float) -> None:
    """Raise ValueError unless x [..., D] and weight [D] are floats on one device and epsilon is above 0."""
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"{name} must have shape [..., D] with D of at least 1; got {list(x.shape)}")
    check_float(name, x)
    check_shape("weight", weight, (x.shape[-1],), x)
    check_float("weight", weight)
    if epsilon <= 0:
        raise ValueError(f"epsilon must be above 0; got {epsilon}")


def norm_bytes(
    values: int, *, value_bytes: int = 2, residual: bool = False, gated: bool = False, backward: bool = False
) -> int:
    """Bytes that must move for `values` normed values: forward x and y, backward x, dy and dx.

    A residual adds its read and the sum's write (backward: the sum's gradient); a gate adds z (backward: z and dz).
    """
    if backward:
        return values * value_bytes * (3 + (1 if residual else 0) + (2 if gated else 0))
    return values * value_bytes * (2 + (2 if residual else 0) + (1 if gated else 0))


def norm_flops(values: int, *, gated: bool = False, backward: bool = False) -> int:
    """Approximate floating-point operations: 4 per value forward and 8 backward, and 5 more each for a gate."""
    return values * ((8 if backward else 4) + (5 if gated else 0))
