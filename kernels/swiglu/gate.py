"""Units of feed-forwards, gated ones and plain ones: the constants of each, and the word by which settings and custom ops name it.

Gated ones are silu(gate) up with changes that cost no memory traffic: the gate's sigmoid may be steeper, or steeper the larger the gate
(tanh's form of GELU is that; an `alpha` of 0 is GELU by the error function), up may begin at 1, and both may be limited, because a product of two large numbers is what overflows first in low precision. An operation carries the unit
as one word, `swiglu@7.0`: the layers between a setting and a kernel need not know what it has.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

TANH_GELU = 2.0 * math.sqrt(2.0 / math.pi)
# Plain units of one matrix, by `alpha`: x sigmoid(alpha x (1 + 0.044715 x^2)), 0 for x Phi(x), and 1 for max(x, 0)^2.
GELUS = {"gelu": 0.0, "gelu_tanh": TANH_GELU}
PLAIN = {"squared_relu": 1.0} | GELUS


class Gate(NamedTuple):
    """gate sigmoid(alpha gate (1 + cubic gate^2)) (up + shift), with gate at most `limit` and up between -limit and limit; None: no
    limit. alpha 0: gate Phi(gate), Phi the normal distribution's, instead."""

    alpha: float = 1.0
    shift: float = 0.0
    limit: float | None = None
    cubic: float = 0.0

    def limited(self, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        """Limit gate and up, and shift up; if there is neither, what came is returned."""
        if self.limit is not None:
            gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return gate, up + self.shift if self.shift else up

    def steep(self, gate: Tensor) -> Tensor:
        """alpha gate, of which silu is alpha times the unit's."""
        return gate if self.alpha == 1.0 else gate * self.alpha

    def factor(self, gate: Tensor) -> Tensor:
        """What up is multiplied by, a new tensor."""
        if self.cubic or not self.alpha:
            return functional.gelu(gate, approximate="tanh" if self.alpha else "none")
        factor = functional.silu(self.steep(gate))
        return factor if self.alpha == 1.0 else factor.div_(self.alpha)

    def factor_backward(self, d_factor: Tensor, gate: Tensor) -> Tensor:
        """The gradient of gate from that of the factor."""
        if self.cubic or not self.alpha:
            return gelu_backward(d_factor, gate, self.alpha)
        return torch.ops.aten.silu_backward(d_factor, self.steep(gate))

    def pass_limits(self, d_gate: Tensor, d_up: Tensor, raw_gate: Tensor, raw_up: Tensor) -> None:
        """Set gradients to zero if a limit held the numbers that came."""
        if self.limit is not None:
            d_gate.masked_fill_(raw_gate > self.limit, 0)
            d_up.masked_fill_(raw_up.abs() > self.limit, 0)

    def constants(self) -> dict[str, Any]:
        """Values for which Triton kernels are compiled (`amfm.kernels.common.silu`); a limit of 0 is none."""
        assert self.alpha and not self.cubic, "checked: experts have no gated GELU"
        return {"ALPHA": self.alpha, "SHIFT": self.shift, "LIMIT": self.limit or 0.0}


# Shazeer 2020 (arXiv 2002.05202), section 2; OpenAI 2025 (arXiv 2508.10925), section 2.2, for the second; tanh's form of GELU is
# in Hendrycks and Gimpel 2016 (arXiv 1606.08415), section 2: (1 + tanh(x)) / 2 is sigmoid(2 x).
GATES = {
    "swiglu": Gate(),
    "swiglu_oai": Gate(1.702, 1.0),
    "geglu": Gate(TANH_GELU, cubic=0.044715),
    "geglu_erf": Gate(0.0),
}
SWIGLU = GATES["swiglu"]


def gelu_backward(grad: Tensor, x: Tensor, alpha: float) -> Tensor:
    """The gradient of GELU by the error function, or by tanh (`alpha` above 0)."""
    return torch.ops.aten.gelu_backward(grad, x, approximate="tanh" if alpha else "none")


def plain_unit_of(x: Tensor, activation: str) -> Tensor:
    """A unit of `PLAIN` in the input's dtype, a new tensor."""
    if activation in GELUS:
        return functional.gelu(x, approximate="tanh" if GELUS[activation] else "none")
    rectified = functional.relu(x)  # which autograd needs as it is
    return rectified.square() if rectified.requires_grad else rectified.square_()


def unit_constants(activation: str) -> dict[str, Any]:
    """Values for which kernels that compute an activation are compiled; of plain units only ALPHA counts, and of none ("") nothing."""
    unit = find_gate(activation or "squared_relu")
    if unit is None:
        return {"SWIGLU": False, "ALPHA": PLAIN.get(activation, 1.0), "SHIFT": 0.0, "LIMIT": 0.0}
    return {"SWIGLU": True, **unit.constants()}


def name_activation(activation: str, limit: float | None) -> str:
    """The word of an activation with a limit, as operations take it."""
    return activation if limit is None else f"{activation}@{limit}"


@functools.cache
def find_gate(activation: str) -> Gate | None:
    """The gated unit of a word; None for a plain one.

    Raises ValueError for an unknown activation, or a limit that is not above 0 or that the activation does not have.
    """
    name, _, limit = activation.partition("@")
    if activation in PLAIN:
        return None
    if name not in GATES:
        raise ValueError(f"activation must be one of {', '.join((*GATES, *PLAIN))}; got {activation!r}")
    if not limit:
        return GATES[name]
    if not float(limit) > 0:
        raise ValueError(f"the limit of an activation must be above 0; got {activation!r}")
    return GATES[name]._replace(limit=float(limit))
