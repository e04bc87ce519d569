"""SiLU and its derivative inside Triton kernels: the convolution, the gated norm, SwiGLU and the experts share them."""

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
