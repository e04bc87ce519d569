"""Which implementation of an operation runs: the step-by-step reference, PyTorch, our Triton kernels, or C on a CPU.

A choice that this machine cannot honour is an error that says why; nothing falls back silently.

Every operation asks `resolve_backend` at each call, so that tests and tools can choose by argument; what it has
to look up is cached.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import logging
import os
import re

import torch

from amfm.kernels.runtime.compiling import assume_constant
from amfm.kernels.runtime.first_use import DEFAULT_CASES, CannotCheck, can_be_checked, find_faults
from amfm.kernels.runtime.user_cache import place_triton_cache

BACKENDS = ("auto", "triton", "native", "torch", "reference")

# One process is either interpreted or compiled: Triton reads the variable when it is imported.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")

# Multiply-adds are fused on purpose: unasked, Triton 3.9 fuses and warns, and later releases are not to fuse.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

_LOG = logging.getLogger(__name__)
_LOGGED: set[tuple[str, str]] = set()  # choices that were reported

# (first bad version, first good version, compute capability major, what goes wrong). Triton 3.4.0 to 3.7.0 also goes
# wrong on Hopper where the transposed result of one product enters another: no kernel of ours has that form, which
# kernels/proof/ahead_of_time.py finds and the ahead-of-time tests reject.
_MISCOMPILES = (
    (
        (3, 8, 0),
        (3, 8, 1),
        9,
        "products with small tiles leave columns of a weight gradient at zero on Hopper (pytorch#188841)",
    ),
    # Compiled ahead of time; the pass that fails is TritonNvidiaGPUOptimizeTMemLayouts. 3.5.1 and 3.8.0 compile them.
    (
        (3, 6, 0),
        (3, 8, 0),
        10,
        "its compiler ends in an error on the gradients of Mamba2 and the delta rule on Blackwell",
    ),
)
# Set to 1, kernels run under a Triton that is rejected: for those who test a GPU or a compiler.
ALLOW_VARIABLE = "AMFM_ALLOW_TRITON"
# Multiprocessors that multiply bfloat16.
_LEAST_CAPABILITY = 8
REQUIREMENTS = (
    "The kernels need an NVIDIA GPU of compute capability 8.0 or more (A100, H100, H200, B200) and a torch of 2.9 to 2.15 "
    "for CUDA with the Triton that it pins; 3.8.0, which torch 2.14 pins, fails on Hopper, and 3.6.0 to 3.7.1 (torch 2.10 to "
    "2.13) on Blackwell"
)


def resolve_for_run(requested: str, device: torch.device, dtype: torch.dtype, *, unfit: str | None) -> str:
    """`resolve_backend` for a run in `dtype`: "auto" is "torch" in float32 on CUDA, `native.choose_on_cpu` with `unfit` on a CPU.

    Products of float32 operands take all of a thread's registers and more (docs/gpu.md has the numbers), so PyTorch's own
    products are the faster ones there. "triton" is honoured. Raises ValueError as `resolve_backend` does.
    """
    if requested == "auto" and device.type == "cpu":
        from amfm.kernels.runtime.native import choose_on_cpu

        backend, reason = choose_on_cpu(dtype, unfit)
        _log_choice(backend, reason)
        return backend
    if requested == "auto" and device.type == "cuda" and dtype == torch.float32:
        _log_choice("torch", "products of float32 spill the registers of Triton kernels; bf16 runs them")
        return "torch"
    return resolve_backend(requested, device)


def resolve_backend(requested: str, device: torch.device, operation: str = "", cases: str = DEFAULT_CASES) -> str:
    """Turn the backend that was asked for into the one that runs on `device`: "triton", "native", "torch" or "reference".

    "auto" is "triton" on CUDA and "torch" elsewhere, logged once with its reason. operation: the name in OPERATIONS of
    the module `cases` of the one that asks; its kernels are checked at their first use (`first_use.py`); without C it runs in "torch".

    Raises ValueError for an unknown name, when Triton was asked for and cannot run here (no CUDA device and no
    interpreter, Triton not installed, or a Triton version known to miscompile for this GPU), for an operation whose
    kernels were wrong at their first use, and when native code was asked for and cannot run here.
    """
    if requested in ("torch", "reference"):
        return requested
    if requested not in BACKENDS:
        raise ValueError(f"kernels backend must be one of {', '.join(BACKENDS)}; got {requested!r}")
    if requested == "native":
        from amfm.kernels.runtime.native import check_native

        check_native(device)
        return "native" if operation in ("", "mamba2") else "torch"
    if requested == "auto":
        if device.type != "cuda":
            _log_choice("torch", f"the tensors are on {device.type}, and Triton kernels need CUDA")
            return "torch"
        _check_triton(device, operation, cases)
        _log_choice("triton", "the tensors are on CUDA")
        return "triton"
    _check_triton(device, operation, cases)
    return "triton"


@functools.cache
def triton_version() -> tuple[int, int, int] | None:
    """Version of the installed Triton as three numbers, None where it is not installed."""
    if importlib.util.find_spec("triton") is None:
        return None
    major, minor, patch = [*map(int, re.findall(r"\d+", importlib.metadata.version("triton"))), 0, 0][:3]
    return major, minor, patch


def find_miscompile(version: tuple[int, int, int], capability_major: int) -> str | None:
    """What a Triton version is known to get wrong on GPUs of a compute capability, None if nothing is known."""
    for first_bad, first_good, major, fault in _MISCOMPILES:
        if major == capability_major and first_bad <= version < first_good:
            return fault
    return None


@assume_constant
def _check_triton(device: torch.device, operation: str, cases: str) -> None:
    """Raise ValueError if an operation's kernels cannot run on `device`, or are wrong; every call of one asks."""
    refusal = refuse_triton(device)
    if refusal is None and device.type == "cuda":
        place_triton_cache()
        if operation and can_be_checked():
            refusal = _refuse_operation(operation, device, cases)
    if refusal is not None:
        raise ValueError(refusal)


@functools.cache
def refuse_triton(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on `device`; looked up once a device, because it reads installed packages."""
    version = triton_version()
    if version is None:
        return (
            'kernels backend "triton" needs the package triton, which is not installed; use "torch", or '
            f"`pip install triton` in the version that your torch asks for. {REQUIREMENTS}"
        )
    if INTERPRETED or device.type == "meta":
        return None
    if device.type != "cuda":
        return (
            f'kernels backend "triton" needs a CUDA device; the tensors are on {device.type}. Use "torch", or set '
            "TRITON_INTERPRET=1 before Python starts to run the kernels in Triton's (slow) interpreter"
        )
    major, minor = torch.cuda.get_device_capability(device)
    if major < _LEAST_CAPABILITY:
        return (
            f'kernels backend "triton" needs compute capability {_LEAST_CAPABILITY}.0; this GPU has {major}.{minor}. '
            f'Use "torch". {REQUIREMENTS}'
        )
    fault = find_miscompile(version, major)
    if fault is not None:
        return judge_miscompile(fault, version, allowed=os.environ.get(ALLOW_VARIABLE) == "1")
    return None


@functools.cache
def _refuse_operation(operation: str, device: torch.device, cases: str = DEFAULT_CASES) -> str | None:
    """What was wrong with an operation's kernels at their first use on a GPU; None if nothing was or it is allowed."""
    command = f"python -m amfm.kernels.acceptance --op {operation}"
    command += "" if cases == DEFAULT_CASES else f" --cases {cases}"
    try:
        faults = find_faults(operation, device, cases)
    except CannotCheck as reason:
        _LOG.warning("%s; they run unchecked. `%s` checks them", reason, command)
        return None
    if not faults:
        return None
    said = f"the kernels of {operation} are wrong on this GPU: {'; '.join(faults)}"
    if os.environ.get(ALLOW_VARIABLE) == "1":
        _LOG.warning("kernels run because %s=1, though %s", ALLOW_VARIABLE, said)
        return None
    return (
        f"{said}. Use kernels.backend=torch, or another release of torch with its Triton; `{command}` "
        f"tells more, and {ALLOW_VARIABLE}=1 runs them anyway. {REQUIREMENTS}"
    )


def judge_miscompile(fault: str, version: tuple[int, int, int], *, allowed: bool) -> str | None:
    """The rejection of a Triton with a known fault, with what pip can install instead; None, and a warning, where allowed.

    PyTorch pins its Triton, so that the fix is a release of torch: 2.15 brings Triton 3.9.0, which is good on all GPUs.
    """
    shown = ".".join(map(str, version))
    if allowed:
        _LOG.warning("kernels run under Triton %s because %s=1, though %s", shown, ALLOW_VARIABLE, fault)
        return None
    return (
        f'kernels backend "triton" rejects Triton {shown} on this GPU: {fault}. torch pins its Triton: use '
        f"`pip install 'torch>=2.15'` (Triton 3.9.0), or kernels.backend=torch; "
        f"{ALLOW_VARIABLE}=1 runs the kernels anyway"
    )


@assume_constant
def _log_choice(backend: str, reason: str) -> None:
    """Report once which backend "auto" means."""
    if (backend, reason) not in _LOGGED:
        _LOGGED.add((backend, reason))
        _LOG.info("kernels backend auto -> %s: %s", backend, reason)
