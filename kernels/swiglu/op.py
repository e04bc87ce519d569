"""Activations of feed-forward layers: gated units such as SwiGLU, the squared ReLU and GELU.

How: all are elementwise, so the cost is memory traffic. Each backend keeps only the input and computes the
activation again in backward. Gate and up stand side by side in one tensor, as one product of the layer before
makes them.
"""

from __future__ import annotations

from torch import Tensor

from amfm.kernels.common.inputs import check_float
from amfm.kernels.runtime.backend import resolve_backend
from amfm.kernels.swiglu.gate import PLAIN, SWIGLU, Gate
from amfm.kernels.swiglu.reference import plain_unit_reference, swiglu_reference
from amfm.kernels.swiglu.torch_impl import plain_unit_torch, swiglu_torch


def swiglu(gate_up: Tensor, unit: Gate = SWIGLU, *, backend: str = "auto") -> Tensor:
    """silu(gate) * up, where the last dim of 2F holds gate, then up; or another gated unit of the two.

    Shapes: [..., 2F] -> [..., F], in the input's dtype, computed in float32. Saves only the input.
    Raises ValueError for an odd last dim or a dtype that is not floating point.
    Source: Shazeer 2020 (arXiv 2002.05202), section 2.
    """
    check_float("gate_up", gate_up)
    if gate_up.dim() == 0 or gate_up.shape[-1] % 2:
        raise ValueError(f"gate_up must have an even last dim (gate, then up); got {list(gate_up.shape)}")
    backend = resolve_backend(backend, gate_up.device, "swiglu")
    if backend == "triton":
        from amfm.kernels.swiglu.triton_impl import swiglu_triton

        return swiglu_triton(gate_up, unit)
    return swiglu_torch(gate_up, unit) if backend == "torch" else swiglu_reference(gate_up, unit)


def plain_unit(x: Tensor, activation: str, *, backend: str = "auto") -> Tensor:
    """A unit of one matrix, `gate.PLAIN`, element by element, in the input's dtype, computed in float32. Saves only the input.

    Raises ValueError for a dtype that is not floating point and an activation that is not one of them.
    Sources: So et al. 2021 (arXiv 2109.08668), section 3; Hendrycks and Gimpel 2016 (arXiv 1606.08415), section 2.
    """
    check_float("x", x)
    if activation not in PLAIN:
        raise ValueError(f"activation must be one of {', '.join(PLAIN)}; got {activation!r}")
    backend = resolve_backend(backend, x.device, "swiglu")
    if backend == "triton":
        from amfm.kernels.swiglu.triton_impl import plain_unit_triton

        return plain_unit_triton(x, activation)
    return plain_unit_torch(x, activation) if backend == "torch" else plain_unit_reference(x, activation)


def squared_relu(x: Tensor, *, backend: str = "auto") -> Tensor:
    """max(x, 0)^2 as `plain_unit` computes it."""
    return plain_unit(x, "squared_relu", backend=backend)


def swiglu_bytes(elements: int, size: int, *, backward: bool) -> int:
    """Least bytes for `elements` outputs: gate, up and y; backward reads gate, up, dy and writes both gradients.

    `size` is the bytes of one number.
    """
    return elements * size * (5 if backward else 3)


def squared_relu_bytes(elements: int, size: int, *, backward: bool) -> int:
    """Least bytes: x read, y written; backward reads x and dy and writes dx."""
    return elements * size * (3 if backward else 2)


def swiglu_flops(elements: int, *, backward: bool) -> int:
    """Floating point operations, an exponential counted as one.

    Forward: exponential, sum, division and two products; backward computes the sigmoid again and both
    gradients.
    """
    return elements * (12 if backward else 5)
