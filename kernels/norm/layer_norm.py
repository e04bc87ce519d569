"""LayerNorm: its definition, PyTorch's form, and the operation, which few models have."""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor
from torch.nn import functional

from amfm.kernels.common.inputs import check_float, check_shape
from amfm.kernels.norm.op import check_rows
from amfm.kernels.norm.torch_impl import normalize
from amfm.kernels.runtime.backend import resolve_backend


@overload
def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, epsilon: float, *, residual: None = None, backend: str = "auto"
) -> Tensor: ...


@overload
def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, epsilon: float, *, residual: Tensor, backend: str = "auto"
) -> tuple[Tensor, Tensor]: ...


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, epsilon: float, *, residual: Tensor | None = None, backend: str = "auto"
) -> Tensor | tuple[Tensor, Tensor]:
    """y = (h - mean(h)) / sqrt(variance(h) + epsilon) * weight + bias over the last dim, with h as in `rms_norm`.

    x and residual [..., D] in one dtype, weight and bias [D]. Means are float32 (float64 for float64 inputs).

    Returns y in the dtype of x; with a residual (y, h). Raises ValueError for shapes, dtypes or devices that do not
    fit. Source: Ba et al. 2016, arXiv 1607.06450.
    """
    check_rows("x", x, weight, epsilon)
    check_shape("bias", bias, (x.shape[-1],), x)
    check_float("bias", bias)
    if residual is not None:
        check_shape("residual", residual, tuple(x.shape), x)
        check_float("residual", residual, x)
    backend = resolve_backend(backend, x.device, "norm")
    if backend == "triton":
        from amfm.kernels.norm.triton_impl import layer_norm_triton

        y, h = layer_norm_triton(x, weight, bias, epsilon, residual)
        return y if residual is None else (y, h)
    h = x if residual is None else x + residual
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    if backend == "reference":
        y = normalize_centered(h.to(wide), weight.to(wide), bias.to(wide), epsilon).to(x.dtype)
    else:
        y = layer_norm_torch(h, weight, bias, epsilon)
    return y if residual is None else (y, h)


def normalize_centered(x: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> Tensor:
    """(x - mean) / sqrt(variance + epsilon) * weight + bias over the last dim (Ba et al. 2016, arXiv 1607.06450)."""
    return normalize(x - x.mean(-1, keepdim=True), weight, epsilon) + bias


def layer_norm_torch(x: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> Tensor:
    """`layer_norm` without a residual, PyTorch's own, in the wider dtype of x and the weights: it widens narrow ones inside."""
    wide = torch.promote_types(x.dtype, weight.dtype)
    return functional.layer_norm(x.to(wide), (x.shape[-1],), weight.to(wide), bias.to(wide), epsilon).to(x.dtype)
