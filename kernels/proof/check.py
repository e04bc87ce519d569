"""Runs one trial of an operation's kernels and says what is wrong with them, on a GPU or in Triton's interpreter.

Every output and gradient is compared with float64, next to the error of PyTorch in the same dtype. Rounding to 16 bits costs any
implementation digits, and how many depends on the operation; so a tensor's bound is twice what PyTorch misses of it, and never
less than a few roundings of its dtype. The worst tensor decides: a mean over tensors would let one wrong gradient pass.

Triton's interpreter computes in float32 throughout, so tests of kernels would miss every error of rounding that bfloat16 makes on
a GPU. `emulate_rounding` replaces its casts and products while a block runs: bfloat16 operands, tf32, casts to the nearest value.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import triton.language as tl
from torch import Tensor
from triton.errors import TritonError
from triton.runtime import interpreter
from triton.testing import do_bench

from amfm.kernels.cases import Call, Problem, Sized, evaluate
from amfm.kernels.runtime.backend import INTERPRETED
from amfm.kernels.runtime.interpreter import EMULATIONS
from amfm.kernels.runtime.tuning import describe_launch_failure

_TF32_BITS = np.uint32(0xFFFFE000)
# How many times as far from float64 as PyTorch in the same dtype a kernel may be: it adds in another order.
FACTOR = 2.0
# A few roundings of operands and results, relative RMS: below this PyTorch's own error is luck.
FLOORS = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 6e-3}


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


@dataclass(frozen=True)
class TensorVerdict:
    """Relative RMS errors of one output or gradient, ours and PyTorch's in the same dtype, and the bound for ours."""

    name: str
    error: float
    torch_error: float
    bound: float

    @property
    def share(self) -> float:
        """The error as a share of its bound: above 1 the tensor is wrong."""
        return self.error / self.bound

    def as_json(self) -> dict[str, str | float | None]:
        """The verdict as JSON has it: an error that is not finite is null."""
        return {
            "name": self.name,
            "error": finite(self.error),
            "torch_error": finite(self.torch_error),
            "bound": self.bound,
        }

    @property
    def holds(self) -> bool:
        """Whether the tensor is right; NaN and infinity are not."""
        return self.error <= self.bound


def judge(
    ours: Mapping[str, Tensor],
    torch_same: Mapping[str, Tensor],
    exact: Mapping[str, Tensor],
    dtype: torch.dtype,
    sums: Mapping[str, str] | None = None,
) -> list[TensorVerdict]:
    """A verdict for each tensor, the worst first.

    torch_same: PyTorch's values in `dtype`, the dtype of the inputs; exact: float64. sums: leaves whose gradient sums another
    leaf's over all tokens (`Problem.sums`), which widens the floor by what cancels.
    """
    verdicts = []
    for name, value in ours.items():
        error, torch_error = relative_error(value, exact[name]), relative_error(torch_same[name], exact[name])
        terms = (sums or {}).get(name.removeprefix("d_"))
        widened = 1.0 if terms is None else max(1.0, _norm(exact[f"d_{terms}"]) / max(_norm(exact[name]), 1e-30))
        # PyTorch's own error may be infinite where it fails; that excuses no one.
        base = torch_error if torch_error < 1.0 else 0.0
        verdicts.append(TensorVerdict(name, error, torch_error, max(FACTOR * base, FLOORS[dtype] * widened)))
    # NaN compares with nothing, so it is put first by hand.
    return sorted(verdicts, key=lambda each: each.share if each.share == each.share else float("inf"), reverse=True)


def narrowest(tensors: Iterable[Tensor]) -> torch.dtype:
    """The narrowest dtype of an operation's inputs: what its rounding is judged by."""
    return min((tensor.dtype for tensor in tensors), key=lambda dtype: dtype.itemsize)


def finite(value: float) -> float | None:
    """The value; None for NaN and infinity, which JSON does not have."""
    return value if math.isfinite(value) else None


def relative_error(value: Tensor, exact: Tensor) -> float:
    """RMS of the difference over RMS of the exact values: NaN for values that are not finite, absolute where exact is zero."""
    if value.shape != exact.shape:
        return float("inf")
    difference, scale = _norm(value.double() - exact.double()), _norm(exact)
    return difference / scale if scale > 0.0 else difference


def _norm(tensor: Tensor) -> float:
    return float(tensor.double().norm())
