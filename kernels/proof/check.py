"""Runs one trial of an operation's kernels and says what is wrong with them, on a GPU or in Triton's interpreter.

Times work on a CUDA device.

Lets Triton's interpreter round as a GPU does: bfloat16 operands of products, tf32, and casts to the nearest value.

Why: without it the interpreter computes in float32 throughout, so tests of kernels would miss every error of
rounding that bfloat16 makes on a GPU. It replaces the interpreter's casts and products while a block runs.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import triton.language as tl
from triton.errors import TritonError
from triton.runtime import interpreter
from triton.testing import do_bench

from amfm.kernels.cases.problem import Problem
from amfm.kernels.cases.trial import Call, Sized, evaluate
from amfm.kernels.proof.verdict import TensorVerdict, judge, narrowest
from amfm.kernels.runtime.backend import INTERPRETED
from amfm.kernels.runtime.interpreter import EMULATIONS
from amfm.kernels.runtime.launch_failure import describe_launch_failure

_TF32_BITS = np.uint32(0xFFFFE000)


@contextmanager
def emulate_rounding() -> Iterator[None]:
    """Inside, kernels take the operands that they take on a GPU, rounded as there; sums of products stay float32.

    The interpreter on its own cuts float32 to bfloat16 instead of rounding it, multiplies the bit patterns of bfloat16,
    and takes tf32 for float32, so that kernels give it float32 operands. On a GPU products add up in another order, and
    tf32 operands lose their last 13 bits as here. Raises RuntimeError without Triton's interpreter.
    """
    if not INTERPRETED:
        raise RuntimeError("rounding is emulated in Triton's interpreter only; start Python with TRITON_INTERPRET=1")
    builder, convert, multiply = (
        interpreter.interpreter_builder,
        interpreter._convert_float,
        interpreter.interpreter_builder.create_dot,
    )

    def rounded(values: Any, given: Any, wanted: Any, mode: Any) -> Any:
        if (given, wanted) == (tl.float32, tl.bfloat16):
            return _to_bfloat16(values)
        return (
            _from_bfloat16(values)
            if (given, wanted) == (tl.bfloat16, tl.float32)
            else convert(values, given, wanted, mode)
        )

    def product(left: Any, right: Any, added: Any, precision: Any, *rest: Any) -> Any:
        left, right = (_operand(each, tf32=precision.name == "TF32") for each in (left, right))
        return multiply(left, right, added, precision, *rest)

    interpreter._convert_float = rounded
    builder.create_dot = product
    EMULATIONS.append(None)
    try:
        yield
    finally:
        EMULATIONS.pop()
        interpreter._convert_float = convert
        del builder.create_dot


def _operand(handle: Any, *, tf32: bool) -> Any:
    """An operand of a product as float32 values."""
    kind, values = handle.dtype.scalar, handle.data
    if kind == tl.bfloat16:
        return interpreter.TensorHandle(_from_bfloat16(values), tl.float32)
    if kind == tl.float32 and tf32:
        return interpreter.TensorHandle((_bits(values) & _TF32_BITS).view(np.float32), tl.float32)
    return handle


def _bits(values: npt.NDArray[Any]) -> npt.NDArray[np.uint32]:
    """The bit patterns of float32 values."""
    return np.ascontiguousarray(values).view(np.uint32)


def _to_bfloat16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Bits of the nearest bfloat16, of the even one where two are as near; NaN stays NaN."""
    bits = _bits(values)
    nearest = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), np.uint32(0x7FC0), nearest).astype(np.uint16)


def _from_bfloat16(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """The float32 values of bfloat16 bit patterns, which are its upper half."""
    return (np.ascontiguousarray(bits).astype(np.uint32) << 16).view(np.float32)


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
