"""Runs one trial of an operation's kernels and says what is wrong with them, on a GPU or in Triton's interpreter.

Times work on a CUDA device.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from triton.errors import TritonError
from triton.testing import do_bench

from amfm.kernels.cases.problem import Problem
from amfm.kernels.cases.trial import Call, Sized, evaluate
from amfm.kernels.proof.emulation import emulate_rounding
from amfm.kernels.proof.verdict import TensorVerdict, judge, narrowest
from amfm.kernels.runtime.backend import INTERPRETED
from amfm.kernels.runtime.launch_failure import describe_launch_failure


def measure_milliseconds(work: Callable[[], object], *, warmup_ms: int = 25, repeat_ms: int = 100) -> float:
    """Median milliseconds of `work` on the current CUDA device, the L2 cache emptied before each run.

    Raises RuntimeError without a CUDA device.

    The median, because clocks and other work make single runs slow but never fast.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("kernels are timed on a CUDA device; this machine has none")
    return float(do_bench(work, warmup=warmup_ms, rep=repeat_ms, return_mode="median"))


# What a kernel that cannot run raises; Triton's own errors are not RuntimeErrors.
REFUSALS = (RuntimeError, ValueError, TypeError, NotImplementedError, TritonError)


@dataclass
class TrialResult:
    """What was found: verdicts of all tensors, the worst first, and faults in words; right if there are none."""

    trial: str
    kind: str
    dtype: str
    tensors: list[TensorVerdict] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    compiled: bool = False
    seconds: float = 0.0

    def as_json(self) -> dict[str, Any]:
        """The result as JSON has it."""
        return asdict(self) | {"tensors": [tensor.as_json() for tensor in self.tensors]}


def check_trial(sized: Sized, device: torch.device, dtype: torch.dtype, *, compiled: bool = False) -> TrialResult:
    """Hold a trial's kernels against float64, tensor by tensor, and a second run's bits against the first's.

    compiled: run once more under torch.compile and judge that as well. A kernel that cannot run is a fault, and so is a
    reference that cannot, as where the GPU has no room for it.
    """
    result = TrialResult(sized.name, sized.kind, str(dtype).removeprefix("torch."), compiled=compiled)
    started = time.perf_counter()
    trial = sized.make(device, dtype)
    narrow = narrowest(trial.leaves.values())  # a router is float32 whatever the model is
    try:
        exact, beside = evaluate(trial, trial.exact, torch.float64), evaluate(trial, "torch")
    except REFUSALS as error:
        result.faults.append(f"PyTorch's form, which ours is compared with, did not run: {error}")
        return result
    ours = _run(trial, result)
    if ours is not None:
        result.tensors = judge(ours.values, beside.values, exact.values, narrow, trial.sums)
        result.faults += _wrong(result.tensors)
        again = _run(trial, result)
        if again is not None:
            result.faults += _drifting(ours, again)
    if compiled and not result.faults:
        traced = _run(trial, result, compiled=True)
        if traced is not None:
            verdicts = judge(traced.values, beside.values, exact.values, narrow, trial.sums)
            result.faults += [f"under torch.compile {fault}" for fault in _wrong(verdicts)]
    result.seconds = time.perf_counter() - started
    return result


def _run(trial: Problem, result: TrialResult, *, compiled: bool = False) -> Call | None:
    """One run of our kernels; None, and a fault, where they cannot run."""
    try:
        with emulate_rounding() if INTERPRETED else contextlib.nullcontext():
            call = evaluate(trial, "triton", compiled=compiled)
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # a fault of the last kernel shows here, not in the next trial
    except REFUSALS as error:
        result.faults.append(describe_launch_failure(error) or f"did not run: {type(error).__name__}: {error}")
        return None
    return call


def _wrong(verdicts: list[TensorVerdict]) -> list[str]:
    """A fault that names the worst tensor, where any is wrong."""
    wrong = [each for each in verdicts if not each.holds]
    if not wrong:
        return []
    worst = wrong[0]
    others = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
    return [
        f"{worst.name} is off by {worst.error:.2g}, above {worst.bound:.2g} (PyTorch in this dtype: "
        f"{worst.torch_error:.2g}){others}"
    ]


def _drifting(one: Call, other: Call) -> list[str]:
    """A fault that names the values whose bits are others in a second run."""
    names = [name for name, value in one.values.items() if not torch.equal(value, other.values[name])]
    return [f"other bits in a second run: {', '.join(names)}"] if names else []
