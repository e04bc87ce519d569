"""What one trial says of kernels, and of references, that do not run."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from amfm.kernels.cases import Inputs, Problem, Sized
from amfm.kernels.proof.check import FACTOR, FLOORS, check_trial, judge

EXACT = {"y": torch.linspace(1, 2, 100, dtype=torch.float64), "d_x": torch.linspace(-1, 1, 100, dtype=torch.float64)}
NEAR = {name: value.bfloat16() for name, value in EXACT.items()}


def sized(failing: str) -> Sized:
    def build(inputs: Inputs) -> Problem:
        def run(given: Mapping[str, Tensor], backend: str) -> dict[str, Tensor]:
            if backend == failing:
                raise RuntimeError(f"no room for {backend}")
            return {"y": 2 * given["x"]}

        return Problem({"x": inputs.normal(8)}, run)

    return Sized("doubling", "first", build)


def test_what_does_not_run_is_a_fault_with_its_reason_and_raises_nothing() -> None:
    for failing, said in (
        ("triton", ["did not run: RuntimeError: no room for triton"]),
        ("reference", ["PyTorch's form, which ours is compared with, did not run: no room for reference"]),
        ("nothing", []),
    ):
        result = check_trial(sized(failing), torch.device("cpu"), torch.float32)
        assert result.faults == said
        assert bool(result.tensors) == (failing == "nothing")


def test_rounding_passes_and_one_wrong_tensor_fails() -> None:
    assert all(each.holds for each in judge(NEAR, NEAR, EXACT, torch.bfloat16))
    wrong = NEAR | {"d_x": NEAR["d_x"].clone().index_fill_(0, torch.tensor([99]), 0.0)}
    verdicts = judge(wrong, NEAR, EXACT, torch.bfloat16)
    assert verdicts[0].name == "d_x" and not verdicts[0].holds
    assert verdicts[1].holds


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_come_first_and_fail(value: float) -> None:
    wrong = NEAR | {"y": NEAR["y"].clone().index_fill_(0, torch.tensor([3]), value)}
    verdicts = judge(wrong, NEAR, EXACT, torch.bfloat16)
    assert verdicts[0].name == "y" and not verdicts[0].holds
    assert verdicts[0].as_json()["error"] is None


def test_a_bound_follows_pytorch_where_that_is_far_off_and_never_falls_below_rounding() -> None:
    rough = {name: value * 1.04 for name, value in EXACT.items()}
    assert judge(rough, rough, EXACT, torch.bfloat16)[0].bound == pytest.approx(FACTOR * 0.04)
    assert judge(NEAR, EXACT, EXACT, torch.bfloat16)[0].bound == FLOORS[torch.bfloat16]
    assert (
        judge(rough, {name: value * float("inf") for name, value in EXACT.items()}, EXACT, torch.bfloat16)[0].holds
        is False
    )


def test_a_sum_that_cancels_is_held_against_what_is_summed() -> None:
    exact = {"d_dt": torch.ones(100, dtype=torch.float64), "d_A_log": torch.tensor([0.5], dtype=torch.float64)}
    ours = {"d_dt": exact["d_dt"], "d_A_log": torch.tensor([0.54], dtype=torch.float64)}
    assert not judge(ours, exact, exact, torch.bfloat16)[0].holds
    assert judge(ours, exact, exact, torch.bfloat16, {"A_log": "dt"})[0].holds
