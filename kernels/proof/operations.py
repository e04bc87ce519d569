"""All cases, by the name of their operation: what a command that speaks of every kernel goes through.

They are the `CASE` of each file `case.py` or `*_case.py` in an operation's folder, so that a new operation is part of every
such command by having one.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch

from amfm.kernels.cases import GpuSizes, HostSizes, Inputs, OperationCase, Problem

_KERNELS = Path(__file__).parents[1]


def _find_cases() -> Iterator[OperationCase]:
    """The case of each operation, in the order of their folders."""
    for path in sorted(_KERNELS.glob("*/*case.py")):
        module = ".".join(path.relative_to(_KERNELS).with_suffix("").parts)
        yield importlib.import_module(f"amfm.kernels.{module}").CASE


OPERATIONS: dict[str, OperationCase] = {case.name: case for case in _find_cases()}
# What is timed, by the name that benchmarks give it; an operation may be timed in two forms.
ON_CARD: dict[str, Callable[[Inputs, GpuSizes], Problem]] = {
    name: build for case in OPERATIONS.values() for name, build in case.on_gpu.items()
}
ON_HOST: dict[str, Callable[[Inputs, HostSizes], Problem]] = {
    name: build for case in OPERATIONS.values() for name, build in case.on_host.items()
}


def host_problem(name: str, dtype: torch.dtype, sizes: HostSizes) -> Problem:
    """What `ON_HOST` has under this name, on the CPU: the same numbers in every process."""
    torch.manual_seed(0)
    return ON_HOST[name](Inputs(torch.device("cpu"), dtype), sizes)


def check_names(names: list[str] | None, known: Mapping[str, object]) -> None:
    """Raise ValueError for a name that `--op` cannot mean."""
    for name in names or ():
        if name not in known:
            raise ValueError(f"--op {name}: there is no such operation; use {', '.join(known)}")
