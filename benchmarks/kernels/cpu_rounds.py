"""One operation on this machine's CPU: its variants compared with ours, then timed in turns, forward and backward.

Called by `python -m benchmarks.kernels` as `python -m benchmarks.kernels.cpu_rounds SETTINGS`, SETTINGS being JSON: a process for
each way to treat freed memory, because the C library takes that setting once. Answers, one for each line on standard
input: shape and differences of the variants in one dtype, the seconds of each of its rounds, then the next dtype.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import json
import statistics
import sys
import time
from typing import Any

import torch
from torch import Tensor

from amfm.data_pipeline.memory import keep_freed_memory
from amfm.launch.cluster.child import open_answers
from amfm.launch.doctor.machine import examine_compiler
from benchmarks.kernels.case import TimedCase, host_case

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
# Largest relative RMS difference between variants, outputs and gradients: rounding in another order; bfloat16 keeps
# eight bits at each of some ten steps.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
# Operations that give the compiler a plain composition of element-wise operations, which it fuses.
FUSED = ("gated_rms_norm", "rms_norm")
# Written before each pass; more than the last cache of a group of cores.
SWEPT_BYTES = 64 * 2**20


def serve(settings: dict[str, Any]) -> None:
    """Compare and time the variants of settings["op"] in every dtype, settings["rounds"] rounds of each."""
    answer = open_answers()
    torch.set_num_threads(settings["threads"])
    if settings["keep_freed_memory"]:
        assert keep_freed_memory(), "the caller looked whether this process can"
    for dtype in DTYPES.values():
        sys.stdin.readline()
        case = host_case(settings["op"], dtype)
        if can_be_compiled(case.op):
            case = add_compiled(case)
        try:
            differences = compare_variants(case)
        except RuntimeError as error:
            answer({"error": str(error)})
            return
        answer({"shape": case.shape, "differences": differences})
        for _ in range(settings["rounds"]):
            sys.stdin.readline()
            answer(time_variants(case))


def can_be_compiled(op: str) -> bool:
    """Whether ours is also timed compiled, as `train.compile` makes it: a fusable operation and a C++ compiler."""
    return op in FUSED and examine_compiler().status == "ok"


def add_compiled(case: TimedCase) -> TimedCase:
    """The case with ours compiled as a further variant, behind ours and before its peers."""
    ours = case.variants["ours"]
    compiled = torch.compile(ours, fullgraph=True, dynamic=False)
    return dataclasses.replace(case, variants={"ours": ours, "ours_compiled": compiled} | case.variants)


def compare_variants(case: TimedCase) -> dict[str, float]:
    """Run each variant once, which compiles what compiles; its difference from ours by name.

    RuntimeError if variants disagree: they would not be the same work.
    """
    results = {name: _run(case, name)[1] for name in case.variants}
    differences = {name: median_difference(results["ours"], result) for name, result in results.items()}
    for name, difference in differences.items():
        if not difference <= TOLERANCE[case.dtype]:
            raise RuntimeError(
                f"{case.op} in {_name(case.dtype)}: {name} differs from ours by {difference:.2g} (relative), above "
                f"{TOLERANCE[case.dtype]:g}; they are not the same work, so their speeds cannot be compared"
            )
    return differences


def time_variants(case: TimedCase) -> dict[str, tuple[float, float]]:
    """One round: seconds of forward and of backward, by variant."""
    seconds = {}
    for name in case.variants:
        gc.collect()
        seconds[name] = _run(case, name)[0]
    return seconds


def _run(case: TimedCase, name: str) -> tuple[tuple[float, float], list[Tensor]]:
    """One forward and backward of a variant: seconds of each, and output and gradients."""
    _sweep_caches()
    started = time.perf_counter()
    output = case.variants[name](*case.leaves)
    between = time.perf_counter()
    # The same weights of the sum for every variant; a loss is its own sum.
    direction = torch.ones_like(output) if output.dim() == 0 else _direction(output)
    _sweep_caches()
    again = time.perf_counter()
    gradients = torch.autograd.grad(output, case.leaves, direction)
    return (between - started, time.perf_counter() - again), [output.detach(), *gradients]


def _sweep_caches() -> None:
    """Leave caches without the operation's tensors and all threads awake, as other layers do in a model.

    Threads that slept while Python collected garbage cost the next operation up to a millisecond.
    """
    _swept().add_(1.0)


@functools.cache
def _swept() -> Tensor:
    return torch.zeros(SWEPT_BYTES // 4)


def _direction(output: Tensor) -> Tensor:
    """Weights of a sum over the output, between -1 and 1, made without a random generator."""
    return torch.linspace(0, 100, output.numel()).sin().view(output.shape).to(output.dtype)


def median_difference(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """Root mean square of the difference over that of ours, of output and gradients: the median over these tensors.

    The median, for single numbers per head cancel and keep few digits in any implementation.
    """
    return statistics.median(
        float((b.float() - a.float()).norm() / a.float().norm().clamp_min(1e-30)) for a, b in zip(ours, theirs)
    )


def _name(dtype: torch.dtype) -> str:
    """Name of a dtype in the tables."""
    return next(name for name, value in DTYPES.items() if value == dtype)


if __name__ == "__main__":
    serve(json.loads(sys.argv[1]))
