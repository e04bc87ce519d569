"""Kernels on a GPU: faults that are found, and what needs a GPU."""

from __future__ import annotations

import pytest
import torch

from amfm.kernels.acceptance.child import time_variants
from amfm.kernels.cases import Minimum, Problem
from amfm.launch.cli import run
from amfm.launch.commands.doctor import print_kernel_table


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine can tune")
@pytest.mark.parametrize("flags", [[], ["--tune"]])
def test_measuring_without_a_gpu_is_refused(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "kernels", *flags]) == 2
    assert "this measures kernels on a CUDA GPU, and this machine has none" in capsys.readouterr().err


@pytest.mark.parametrize("error", [0.001, 0.3, float("nan")])
def test_a_kernel_with_one_wrong_gradient_on_a_card_is_a_fault(
    error: float, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of five tensors one is off: a median over them would let it pass."""

    class Multiply(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *leaves: torch.Tensor) -> torch.Tensor:
            return torch.stack(leaves).sum(0)

        @staticmethod
        def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return (gradient * (1 + error), gradient, gradient, gradient)

    leaves = tuple(torch.ones(8, dtype=torch.bfloat16, requires_grad=True) for _ in range(4))
    named = {str(place): leaf for place, leaf in enumerate(leaves)}
    problem = Problem(
        named, lambda given, backend: {"y": torch.stack([*given.values()]).sum(0)}, "8", Minimum(64, 8), Minimum(64, 8)
    )
    variants = {"torch": problem.on("torch"), "triton": Multiply.apply, "peer": lambda *leaves: leaves[0] * 3}
    found = time_variants("sum", problem, variants, lambda work: 1.0)
    assert len(found["remarks"]) == 1 and "peer cannot run here" in found["remarks"][0]
    assert len(found["faults"]) == (error != 0.001)
    assert error == 0.001 or "gradient 0 is off by" in found["faults"][0]
    print_kernel_table(found | {"hardware": {"card": "none"}})
    assert "worst off float32" in " ".join(capsys.readouterr().out.split())
