"""Kernels on a card: faults that are found, and what needs a card."""

from __future__ import annotations

import pytest
import torch

from kernels.proof.cases.case import Minimum
from launch.bench.kernels.case import TimedCase
from launch.bench.kernels.cuda import find_faults, time_case
from launch.cli import run
from launch.commands.bench.kernels import print_kernel_table


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine can tune")
def test_tuning_without_a_card_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "kernels", "--tune"]) == 2
    assert "--tune times kernels on a CUDA card; this machine has none" in capsys.readouterr().err


@pytest.mark.parametrize("error", [0.01, 0.3, float("nan")])
def test_a_kernel_of_ours_that_is_far_from_float32_on_a_card_is_a_fault(
    error: float, capsys: pytest.CaptureFixture[str]
) -> None:
    x = torch.ones(8, requires_grad=True)
    variants = {"torch": lambda x: 2 * x, "triton": lambda x: 2 * (1 + error) * x, "peer": lambda x: 3 * x}
    case = TimedCase("double", "8", torch.bfloat16, (x,), variants, Minimum(64, 8), Minimum(64, 8))
    remarks: list[str] = []
    rows = time_case(case, lambda work: 1.0, remarks)
    assert remarks == []
    assert len(find_faults(["double"], rows)) == (error != 0.01)
    print_kernel_table({"rows": rows, "remarks": remarks, "hardware": {"card": "none"}})
    out = capsys.readouterr().out
    assert "off float32" in out and f"{error:.2g}" in out and "0.5" in out
