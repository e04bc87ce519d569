"""Trials: every operation has some, the same numbers each time, and PyTorch's own form passes them."""

from __future__ import annotations

import pytest
import torch

from amfm.kernels.cases import evaluate
from amfm.kernels.proof.check import judge
from benchmarks.kernels.operations import OPERATIONS

CPU = torch.device("cpu")


def test_every_operation_is_checked_at_its_first_use_and_at_long_rows() -> None:
    for operation, case in OPERATIONS.items():
        assert case.trials_of({"first"}), f"{operation} has no trial for its first use"
        assert case.trials_of({"long"}), f"{operation} has no long trial"


def test_a_trial_is_the_same_each_time_and_leaves_random_numbers_alone() -> None:
    torch.manual_seed(7)
    wanted = torch.randn(3)
    for operation, case in OPERATIONS.items():
        sized = case.trials_of({"first"})[0]
        torch.manual_seed(7)
        first = sized.make(CPU, torch.bfloat16)
        assert torch.equal(torch.randn(3), wanted), operation
        second = sized.make(CPU, torch.bfloat16)
        assert all(torch.equal(leaf, second.leaves[name]) for name, leaf in first.leaves.items()), operation


@pytest.mark.parametrize(
    "which", [slice(1), pytest.param(slice(1, None), marks=pytest.mark.slow)], ids=["first", "others"]
)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_pytorch_in_float32_passes_the_first_trials(operation: str, which: slice) -> None:
    """One trial of an operation is quick; the formulas of others in float64, tests/kernels/proof/test_operations.py."""
    for sized in OPERATIONS[operation].trials_of({"first"})[which]:
        trial = sized.make(CPU, torch.float32)
        exact = evaluate(trial, trial.exact, torch.float64).values
        ours = evaluate(trial, "torch").values
        assert set(ours) == set(exact) and {f"d_{name}" for name in trial.leaves} <= set(ours)
        worst = judge(ours, ours, exact, torch.float32, trial.sums)[0]
        assert worst.error <= 1e-4, (sized.name, worst)
