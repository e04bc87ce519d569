"""Kernel benchmark on a CUDA card: our Triton kernels, PyTorch, and the public packages that are installed.

How it works: every variant of a case is first compared with our PyTorch code in float32, then timed forward, backward
and both. A peer that cannot run is a remark; one of our own kernels that cannot run, or is too far off, is a fault.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernels.proof.cases.case import CardSizes
from kernels.proof.cases.operations import ON_CARD, check_names
from launch.bench.hardware import describe_hardware
from launch.bench.kernels.audit import BYTES_A_SECOND, FLOPS_A_SECOND
from launch.bench.kernels.case import TimedCase, card_case
from launch.bench.kernels.cpu import PASSES
from launch.bench.kernels.cpu_rounds import median_difference

PEERS = {
    "mamba_ssm": "mamba_ssm",
    "causal_conv1d": "causal_conv1d",
    "fla": "flash-linear-attention",
    "liger_kernel": "liger_kernel",
}
# Relative RMS of any output or gradient in bfloat16 against float32 that a tuned kernel may have.
LARGEST_ERROR = 5e-2
Measure = Callable[[Callable[[], object]], float]


def bench_cuda(
    names: list[str] | None = None, *, report: Callable[[str], None], sizes: CardSizes | None = None
) -> dict[str, Any]:
    """Time every case on the current card: `rows` as `bench_cpu` has them, with `roofline_fraction` against an H100.

    A variant that cannot run its case is named in `remarks` with its reason and has no row. `relative_error` is the
    median over output and gradients of the relative RMS difference from our PyTorch code in float32. `faults` are those
    of our own kernels.
    Raises RuntimeError without a CUDA device, ValueError for an unknown operation.
    """
    from kernels.proof.timing import measure_milliseconds

    check_names(names, ON_CARD)
    device = torch.device("cuda")
    rows: list[dict[str, Any]] = []
    remarks: list[str] = []
    for op in names or ON_CARD:
        report(f"timing {op}")
        rows += time_case(card_case(op, device, sizes or CardSizes()), measure_milliseconds, remarks)
        torch.cuda.empty_cache()
    faults = find_faults(names or [*ON_CARD], rows)
    return {"hardware": _describe_card(device), "rows": rows, "remarks": remarks, "faults": faults}


def find_faults(names: list[str], rows: list[dict[str, Any]]) -> list[str]:
    """Faults of our own kernels: those that did not run or are too far from float32."""
    errors = {row["op"]: row["relative_error"] for row in rows if row["backend"] == "triton"}
    return [
        f"{op} did not run" if op not in errors else f"{op} is off by {errors[op]:.2g}, above {LARGEST_ERROR:g}"
        for op in names
        if not errors.get(op, float("nan")) <= LARGEST_ERROR
    ]


def tune_cuda(
    names: list[str] | None = None, *, report: Callable[[str], None], sizes: CardSizes | None = None
) -> dict[str, Any]:
    """Tune the kernels of these operations on the current card and save its table: `path`, `environment`, `configs`.

    Every candidate is held against our PyTorch code in float32 before it is timed, forward and backward together.
    Raises ValueError for an unknown operation, RuntimeError where this compiler miscompiles a kernel as it stands.
    """
    from kernels.proof.timing import measure_milliseconds
    from kernels.tuning import Table, find_environment, tune

    check_names(names, ON_CARD)
    device = torch.device("cuda")
    table = Table.load(find_environment(device))
    for op in names or ON_CARD:
        case = card_case(op, device, sizes or CardSizes())
        exact = _results(case.variants["torch"], tuple(leaf.detach().float().requires_grad_() for leaf in case.leaves))
        report(f"tuning {op}")
        run = functools.partial(_results, case.variants["triton"], case.leaves)
        tune(run, exact, measure_milliseconds, table, tolerance=LARGEST_ERROR, report=report)
        torch.cuda.empty_cache()
    return {"path": str(table.save()), "environment": vars(table.environment), "configs": table.configs}


def time_case(case: TimedCase, measure: Measure, remarks: list[str]) -> list[dict[str, Any]]:
    """Rows of one case, one variant after the other; reasons of variants that cannot run go to `remarks`."""
    exact = _results(case.variants["torch"], tuple(leaf.detach().float().requires_grad_() for leaf in case.leaves))
    rows, ours = [], None
    for name, variant in case.variants.items():
        try:
            error = median_difference(exact, _results(variant, case.leaves))
            times = _time(case, variant, measure)
        except (RuntimeError, ValueError, TypeError) as reason:
            remarks.append(f"{case.op}: {name} cannot run here: {reason}")
            continue
        ours = times if name == "triton" else ours
        for which, milliseconds in zip(PASSES, times, strict=True):
            rows.append(
                {
                    "op": case.op,
                    "pass": which,
                    "shape": case.shape,
                    "dtype": "bf16",
                    "backend": name,
                    "milliseconds": milliseconds,
                    "roofline_fraction": _fraction(case, which, milliseconds),
                    "ratio": None if ours is None or name == "triton" else milliseconds / ours[PASSES.index(which)],
                    "relative_error": error,
                }
            )
    return rows


def _time(case: TimedCase, variant: Callable[..., Tensor], measure: Measure) -> tuple[float, float, float]:
    """Milliseconds of forward, of backward, and of both in a row."""
    output = variant(*case.leaves)
    direction = torch.ones_like(output)

    def differentiate(output: Tensor, *, keep: bool) -> None:
        torch.autograd.grad(output, case.leaves, direction, retain_graph=keep)

    return (
        measure(lambda: variant(*case.leaves)),
        measure(lambda: differentiate(output, keep=True)),
        measure(lambda: differentiate(variant(*case.leaves), keep=False)),
    )


def _fraction(case: TimedCase, which: str, milliseconds: float) -> float:
    """Fraction of an H100's roofline: its least time for the pass over the time taken."""
    passes = {"forward": (case.forward,), "backward": (case.backward,), "both": (case.forward, case.backward)}[which]
    least = sum(max(moved / BYTES_A_SECOND, flops / FLOPS_A_SECOND) for moved, flops in passes)
    return least * 1e3 / milliseconds


def _results(variant: Callable[..., Tensor], leaves: tuple[Tensor, ...]) -> list[Tensor]:
    """Output and gradients of a variant, with ones as the incoming gradient."""
    output = variant(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, torch.ones_like(output))]


def _describe_card(device: torch.device) -> dict[str, Any]:
    """The card and the versions of what ran on it."""
    versions = {
        name: importlib.metadata.version(package)
        for name, package in PEERS.items()
        if importlib.util.find_spec(name) is not None
    }
    card = {"card": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    return card | {"triton": importlib.metadata.version("triton")} | versions | describe_hardware()
