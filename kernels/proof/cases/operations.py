"""All cases, by the name of their operation: what a command that speaks of every kernel goes through.

A new operation becomes part of every such command by one entry in `OPERATIONS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch

from amfm.kernels.proof.cases import (
    attention,
    causal_conv1d,
    decay_scan,
    decay_scan_vector,
    delta_scan,
    diag_scan,
    linear_cross_entropy,
    mamba2,
    moe,
    norm,
    rope,
    router,
    swiglu,
)
from amfm.kernels.proof.cases.case import CardSizes, HostSizes, Inputs, KernelLaunch, OperationCase, Problem

OPERATIONS: dict[str, OperationCase] = {
    case.name: case
    for case in (
        decay_scan.CASE,
        mamba2.CASE,
        decay_scan_vector.CASE,
        diag_scan.CASE,
        delta_scan.CASE,
        causal_conv1d.CASE,
        norm.CASE,
        attention.CASE,
        linear_cross_entropy.CASE,
        moe.CASE,
        router.CASE,
        swiglu.CASE,
        rope.CASE,
    )
}
# What is timed, by the name that benchmarks give it; an operation may be timed in two forms.
ON_CARD: dict[str, Callable[[Inputs, CardSizes], Problem]] = {
    name: build for case in OPERATIONS.values() for name, build in case.on_card.items()
}
ON_HOST: dict[str, Callable[[Inputs, HostSizes], Problem]] = {
    name: build for case in OPERATIONS.values() for name, build in case.on_host.items()
}


def host_problem(name: str, dtype: torch.dtype, sizes: HostSizes) -> Problem:
    """What `ON_HOST` has under this name, on the CPU: the same numbers in every process."""
    torch.manual_seed(0)
    return ON_HOST[name](Inputs(torch.device("cpu"), dtype), sizes)


def all_launches() -> Iterator[KernelLaunch]:
    """Every kernel in bfloat16 as production launches it on a card; shapes reach a kernel only through its tile.

    Where a constant follows a shape (head size, experts), the cases take those of Granite-4-H and Nemotron-3-Nano.
    """
    for case in OPERATIONS.values():
        yield from case.launches()


def check_names(names: list[str] | None, known: Mapping[str, object]) -> None:
    """Raise ValueError for a name that `--op` cannot mean."""
    for name in names or ():
        if name not in known:
            raise ValueError(f"--op {name}: there is no such operation; use {', '.join(known)}")
