"""What one trial says of kernels, and of references, that do not run."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from amfm.kernels.cases.problem import Inputs, Problem
from amfm.kernels.cases.trial import Sized
from amfm.kernels.proof.check import check_trial


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
