"""Comparing numbers: the relative root-mean-square error that every kernel test states its tolerance in."""

from __future__ import annotations

import torch
from torch import Tensor


def relative_rms(actual: Tensor, expected: Tensor) -> float:
    """RMS of the difference over RMS of the expected values, in float64; 0 where both are zero, inf for NaN or inf."""
    assert actual.shape == expected.shape, f"expected shape {tuple(expected.shape)}, got {tuple(actual.shape)}"
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    if not bool(torch.isfinite(actual).all()):
        return float("inf")
    error = float((actual - expected).pow(2).mean().sqrt()) if actual.numel() else 0.0
    scale = float(expected.pow(2).mean().sqrt()) if actual.numel() else 0.0
    return error / scale if scale > 0.0 else error


def assert_near(actual: Tensor, expected: Tensor, tolerance: float, name: str = "value") -> None:
    """Fail unless the relative RMS error is at most `tolerance`."""
    error = relative_rms(actual, expected)
    assert error <= tolerance, f"{name}: relative RMS error {error:.2e} exceeds {tolerance:.0e}"


def assert_all_near(
    actual: list[Tensor], expected: list[Tensor], tolerance: float, names: list[str] | None = None
) -> None:
    """`assert_near` for each pair, in order."""
    assert len(actual) == len(expected), f"expected {len(expected)} tensors, got {len(actual)}"
    for i, (a, e) in enumerate(zip(actual, expected)):
        assert_near(a, e, tolerance, names[i] if names else f"tensor {i}")


def assert_bitwise(actual: Tensor, expected: Tensor, name: str = "value") -> None:
    """Fail unless both tensors are equal in every bit that counts (0 and -0 are one number)."""
    assert torch.equal(actual, expected), f"{name}: {int((actual != expected).sum())} values differ"
