"""SiLU with its derivative, and softplus, inside Triton kernels: convolution, gated norm, SwiGLU, experts and scan share them."""

# Triton reads a kernel's parameters from the call: they carry no types.
# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: ANN201

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    """Compute 1 / (1 + e^-x), in float32."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def silu(x):
    """Compute x sigmoid(x), in float32."""
    return x / (1.0 + tl.exp(-x))


@triton.jit
def silu_backward(grad, x, share):
    """Compute the gradient of x sigmoid(x) times `grad`, from x and `share`, its sigmoid, which gradients need anyway."""
    return grad * share * (1.0 + x * (1.0 - share))


@triton.jit
def softplus(x):
    """Compute log(1 + e^x), in float32, as precise for large negative x, where it is about e^x.

    log(w) e / (w - 1) with w = 1 + e, rounded, is log(1 + e) to the last bits (Kahan): the rounding of w drops out.
    """
    e = tl.exp(-tl.abs(x))
    w = 1.0 + e
    small = w == 1.0
    return tl.maximum(x, 0.0) + tl.where(small, e, tl.log(w) * e / tl.where(small, 1.0, w - 1.0))
