"""Operations that only one process can check, as those of a GPU in exclusive-process mode; they need no Triton."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from functools import partial

from torch import Tensor

from amfm.kernels.cases import Inputs, OperationCase, Problem, Sized

if os.environ.get("AMFM_TEST_OWNER") != str(os.getpid()):
    raise RuntimeError(
        "CUDA error: CUDA-capable device(s) is/are busy or unavailable\n"
        "Compile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.\n"
    )


def build(factor: float, inputs: Inputs) -> Problem:
    def run(given: Mapping[str, Tensor], backend: str) -> dict[str, Tensor]:
        return {"y": given["x"] * (factor if backend == "triton" else 3.0)}

    return Problem({"x": inputs.normal(40)}, run, exact="torch")


def _trials(name: str, factor: float) -> Iterator[Sized]:
    yield Sized(name, "first", partial(build, factor))


OPERATIONS = {
    name: OperationCase(name, lambda: iter(()), partial(_trials, name, factor))
    for name, factor in (("plain", 3.0), ("off", 2.0))
}
