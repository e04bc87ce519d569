"""Peers are checked against our numbers before they are timed."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from amfm.kernels.cases import NOTHING
from benchmarks.kernels.case import TimedCase
from benchmarks.kernels.cpu_rounds import compare_variants


def test_variants_that_compute_something_else_are_refused() -> None:
    def double(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    case = TimedCase(
        "copy", "3", torch.float32, (torch.ones(3, requires_grad=True),), {"ours": torch.clone}, NOTHING, NOTHING
    )
    wrong = dataclasses.replace(case, variants={"ours": torch.clone, "peer": double})
    assert compare_variants(case) == {"ours": 0.0}
    with pytest.raises(RuntimeError, match="peer differs from ours by 1 "):
        compare_variants(wrong)
