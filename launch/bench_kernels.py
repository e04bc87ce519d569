"""Operations side by side on this machine's CPU: ours against transformers' PyTorch code, forward and backward.

All variants of an operation get the same inputs in the same dtype and take turns, so that a machine that drifts slows
all of them; a figure is a median. Element-wise operations of ours are timed a second time as `train.compile` makes them,
fused, where there is a C++ compiler; what compiles does so in the warm-up, outside of the timed rounds.
"""

from __future__ import annotations

import dataclasses
import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from launch.bench_kernels_peers import OPERATIONS, Case, build_case
from launch.bench_step import describe_hardware
from launch.doctor import examine_compiler

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
# Largest relative RMS difference between variants, outputs and gradients: rounding in another order; bfloat16 keeps
# eight bits at each of some ten steps.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
PASSES = ("forward", "backward", "both")
# Operations that give the compiler a plain composition of element-wise operations, which it fuses.
FUSED = ("gated_rms_norm", "rms_norm")


def bench_cpu(
    names: list[str] | None = None, *, rounds: int, num_threads: int | None, report: Callable[[str], None]
) -> dict[str, Any]:
    """Time every case and return `rows` (a row for each operation, dtype, variant and pass) and the hardware.

    names: the operations to time, all when None. Rows: `op`, `pass` (forward, backward, both), `shape`, `dtype`,
    `backend` (ours_torch, ours_compiled for the operations of `FUSED` where there is a C++ compiler, or the peer's
    name), `milliseconds`, `roofline_fraction` (None: no roofline is known for this processor), `ratio` (how many times
    as long as ours_torch it takes, None for that one: a peer's over that of ours_compiled is how many times as long as
    compiled it takes), `relative_difference` of outputs and gradients from ours_torch.

    Raises ValueError for an unknown operation, RuntimeError where variants disagree: they would not be the same work.
    """
    for name in names or ():
        if name not in OPERATIONS:
            raise ValueError(f"--op {name}: there is no such operation; use {', '.join(OPERATIONS)}")
    before = torch.get_num_threads()
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    rows = []
    try:
        for op in names or OPERATIONS:
            for dtype in DTYPES.values():
                case, remark = build_case(op, dtype), ""
                if op in FUSED and examine_compiler().status == "ok":
                    case = add_compiled(case)
                elif op in FUSED:
                    remark = ", ours_compiled left out: there is no C++ compiler (install g++)"
                report(f"timing {op} in {_name(dtype)}{remark}")
                rows += bench_case(case, rounds)
        hardware = describe_hardware()
    finally:
        torch.set_num_threads(before)
    return {"rounds": rounds, "hardware": hardware, "rows": rows}


def add_compiled(case: Case) -> Case:
    """The case with ours compiled as a further variant, behind ours and before its peers."""
    ours = case.variants["ours"]
    compiled = torch.compile(ours, fullgraph=True, dynamic=False)
    return dataclasses.replace(case, variants={"ours": ours, "ours_compiled": compiled} | case.variants)


def bench_case(case: Case, rounds: int) -> list[dict[str, Any]]:
    """Rows of one case: a warm-up that compares all variants with ours, then timed rounds in turns."""
    results = {name: _run(case, name)[1] for name in case.variants}
    differences = {name: median_difference(results["ours"], result) for name, result in results.items()}
    for name, difference in differences.items():
        if not difference <= TOLERANCE[case.dtype]:
            raise RuntimeError(
                f"{case.op} in {_name(case.dtype)}: {name} differs from ours by {difference:.2g} (relative), above "
                f"{TOLERANCE[case.dtype]:g}; they are not the same work, so their speeds say nothing"
            )
    del results
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in case.variants}
    for _ in range(rounds):
        for name in case.variants:
            gc.collect()
            seconds[name].append(_run(case, name)[0])
    medians = {
        name: (
            statistics.median(forward for forward, _ in times),
            statistics.median(backward for _, backward in times),
            statistics.median(forward + backward for forward, backward in times),
        )
        for name, times in seconds.items()
    }
    return [
        {
            "op": case.op,
            "pass": which,
            "shape": case.shape,
            "dtype": _name(case.dtype),
            "backend": "ours_torch" if name == "ours" else name,
            "milliseconds": median * 1e3,
            "roofline_fraction": None,
            "ratio": None if name == "ours" else median / medians["ours"][place],
            "relative_difference": differences[name],
        }
        for name, times in medians.items()
        for place, (which, median) in enumerate(zip(PASSES, times, strict=True))
    ]


def _run(case: Case, name: str) -> tuple[tuple[float, float], list[Tensor]]:
    """One forward and backward of a variant: seconds of each, and output and gradients."""
    started = time.perf_counter()
    output = case.variants[name](*case.leaves)
    between = time.perf_counter()
    # The same weights of the sum for every variant; a loss is its own sum.
    direction = torch.ones_like(output) if output.dim() == 0 else _direction(output)
    again = time.perf_counter()
    gradients = torch.autograd.grad(output, case.leaves, direction)
    return (between - started, time.perf_counter() - again), [output.detach(), *gradients]


def _direction(output: Tensor) -> Tensor:
    """Weights of a sum over the output, between -1 and 1, made without a random generator."""
    return torch.linspace(0, 100, output.numel()).sin().view(output.shape).to(output.dtype)


def median_difference(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """Root mean square of the difference over that of ours, of output and gradients: the median over these tensors.

    The median, for single numbers a head cancel and keep few digits in any implementation.
    """
    return statistics.median(
        float((b.float() - a.float()).norm() / a.float().norm().clamp_min(1e-30)) for a, b in zip(ours, theirs)
    )


def _name(dtype: torch.dtype) -> str:
    return next(name for name, value in DTYPES.items() if value == dtype)
