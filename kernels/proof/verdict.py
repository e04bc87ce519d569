"""Judges a kernel: every output and gradient against float64, next to the error of PyTorch in the same dtype.

Rounding to 16 bits costs any implementation digits, and how many depends on the operation; so a tensor's bound is twice what
PyTorch misses of it, and never less than a few roundings of its dtype. The worst tensor decides: a mean over tensors would let
one wrong gradient pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

# How many times as far from float64 as PyTorch in the same dtype a kernel may be: it adds in another order.
FACTOR = 2.0
# A few roundings of operands and results, relative RMS: below this PyTorch's own error is luck.
FLOORS = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 6e-3}


@dataclass(frozen=True)
class TensorVerdict:
    """Relative RMS errors of one output or gradient, ours and PyTorch's in the same dtype, and the bound for ours."""

    name: str
    error: float
    torch_error: float
    bound: float

    @property
    def share(self) -> float:
        """The error as a share of its bound: above 1 the tensor is wrong."""
        return self.error / self.bound

    def as_json(self) -> dict[str, str | float | None]:
        """The verdict as JSON has it: an error that is not finite is null."""
        return {
            "name": self.name,
            "error": finite(self.error),
            "torch_error": finite(self.torch_error),
            "bound": self.bound,
        }

    @property
    def holds(self) -> bool:
        """Whether the tensor is right; NaN and infinity are not."""
        return self.error <= self.bound


def judge(
    ours: Mapping[str, Tensor],
    torch_same: Mapping[str, Tensor],
    exact: Mapping[str, Tensor],
    dtype: torch.dtype,
    sums: Mapping[str, str] | None = None,
) -> list[TensorVerdict]:
    """A verdict for each tensor, the worst first.

    torch_same: PyTorch's values in `dtype`, the dtype of the inputs; exact: float64. sums: leaves whose gradient sums another
    leaf's over all tokens (`Problem.sums`), which widens the floor by what cancels.
    """
    verdicts = []
    for name, value in ours.items():
        error, torch_error = relative_error(value, exact[name]), relative_error(torch_same[name], exact[name])
        terms = (sums or {}).get(name.removeprefix("d_"))
        widened = 1.0 if terms is None else max(1.0, _norm(exact[f"d_{terms}"]) / max(_norm(exact[name]), 1e-30))
        # PyTorch's own error may be infinite where it fails; that excuses no one.
        base = torch_error if torch_error < 1.0 else 0.0
        verdicts.append(TensorVerdict(name, error, torch_error, max(FACTOR * base, FLOORS[dtype] * widened)))
    # NaN compares with nothing, so it is put first by hand.
    return sorted(verdicts, key=lambda each: each.share if each.share == each.share else float("inf"), reverse=True)


def narrowest(tensors: Iterable[Tensor]) -> torch.dtype:
    """The narrowest dtype of an operation's inputs: what its rounding is judged by."""
    return min((tensor.dtype for tensor in tensors), key=lambda dtype: dtype.itemsize)


def finite(value: float) -> float | None:
    """The value; None for NaN and infinity, which JSON does not have."""
    return value if math.isfinite(value) else None


def relative_error(value: Tensor, exact: Tensor) -> float:
    """RMS of the difference over RMS of the exact values: NaN for values that are not finite, absolute where exact is zero."""
    if value.shape != exact.shape:
        return float("inf")
    difference, scale = _norm(value.double() - exact.double()), _norm(exact)
    return difference / scale if scale > 0.0 else difference


def _norm(tensor: Tensor) -> float:
    return float(tensor.double().norm())
