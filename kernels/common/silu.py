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
def steep_silu(x, ALPHA: tl.constexpr):
    """Compute x sigmoid(ALPHA x), in float32."""
    return x / (1.0 + tl.exp(-ALPHA * x))


@triton.jit
def silu_backward(grad, x, share):
    """Compute the gradient of x sigmoid(x) times `grad`, from x and `share`, its sigmoid, which gradients need anyway."""
    return grad * share * (1.0 + x * (1.0 - share))


@triton.jit
def limit_gate(gate, up, SHIFT: tl.constexpr, LIMIT: tl.constexpr):
    """Limit gate from above and up from both sides, and shift up; NaN stays NaN. A limit of 0 is none."""
    if LIMIT > 0.0:
        gate = tl.where(gate > LIMIT, LIMIT, gate)
        up = tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up))
    if SHIFT != 0.0:
        up = up + SHIFT
    return gate, up


@triton.jit
def pass_limit(grad, x, LIMIT: tl.constexpr, BOTH: tl.constexpr):
    """The gradient of a limited x: zero above the limit, and with BOTH below its negative."""
    if LIMIT > 0.0:
        grad = tl.where(x > LIMIT, 0.0, grad)
        if BOTH:
            grad = tl.where(x < -LIMIT, 0.0, grad)
    return grad


@triton.jit
def softplus(x):
    """Compute log(1 + e^x), in float32, as precise for large negative x, where it is about e^x.

    log(w) e / (w - 1) with w = 1 + e, rounded, is log(1 + e) to the last bits (Kahan): the rounding of w drops out.
    """
    e = tl.exp(-tl.abs(x))
    w = 1.0 + e
    small = w == 1.0
    return tl.maximum(x, 0.0) + tl.where(small, e, tl.log(w) * e / tl.where(small, 1.0, w - 1.0))
