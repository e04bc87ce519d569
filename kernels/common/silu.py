"""SiLU and GELU with their derivatives, and softplus, inside Triton kernels: convolution, gated norm, SwiGLU, experts and scan share them."""

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
def normal_share(x):
    """Compute Phi(x), the normal distribution's, in float32."""
    return 0.5 * (1.0 + tl.erf(0.7071067811865476 * x))


@triton.jit
def normal_slope(x, share):
    """Compute the derivative of x Phi(x) from x and `share`, Phi(x)."""
    return share + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)


@triton.jit
def plain_unit(x, ALPHA: tl.constexpr):
    """Compute a unit of one matrix (`amfm.kernels.swiglu.gate.PLAIN`), in float32."""
    if ALPHA == 1.0:
        positive = tl.maximum(x, 0.0)
        result = positive * positive
    elif ALPHA == 0.0:
        result = x * normal_share(x)
    else:
        result = x * sigmoid(ALPHA * x * (1.0 + 0.044715 * x * x))
    return result


@triton.jit
def plain_backward(grad, x, ALPHA: tl.constexpr):
    """Compute the gradient of `plain_unit` times `grad`, in float32."""
    if ALPHA == 1.0:
        result = grad * 2.0 * tl.maximum(x, 0.0)
    elif ALPHA == 0.0:
        result = grad * normal_slope(x, normal_share(x))
    else:
        inner = ALPHA * x * (1.0 + 0.044715 * x * x)
        # 1 - sigmoid, rounded once: its factor is of the order of x^3.
        slope = ALPHA * x * (1.0 + 0.134145 * x * x) * sigmoid(-inner)
        result = grad * sigmoid(inner) * (1.0 + slope)
    return result


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
