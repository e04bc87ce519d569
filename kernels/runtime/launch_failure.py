"""Puts a failed launch into words: the kernel, its tile, and what helps.

Triton says what it lacks but not for which kernel. Its launcher knows, and its frame is in the error's traceback: the kernel
is the frame's `self`, the tile its keyword arguments.
"""

from __future__ import annotations

from typing import Any

from triton.errors import TritonError
from triton.runtime.errors import OutOfResources
from triton.runtime.jit import JITFunction

_OPTIONS = ("num_warps", "num_stages")


def describe_launch_failure(error: BaseException) -> str | None:
    """Kernel, tile, cause and fix of an error that Triton raised; None for any other error.

    Out of shared memory or registers, a compiler that rejects the kernel, an assembler that fails.
    """
    if not isinstance(error, TritonError):
        return None
    kernel, tile = _launch_of(error)
    shown = ", ".join(f"{name}={value}" for name, value in tile.items()) or "its only one"
    cause = " ".join(str(error).split())[:500]
    if isinstance(error, OutOfResources):
        return (
            f"{kernel} with the tile {shown} does not fit this GPU ({cause}): choose its tile by `amfm bench kernels "
            "--tune`, or run with kernels.backend=torch"
        )
    return (
        f"{kernel} with the tile {shown} does not compile under this Triton ({type(error).__name__}: {cause}): install "
        "the Triton that docs/gpu.md names for your torch, or run with kernels.backend=torch"
    )


def _launch_of(error: BaseException) -> tuple[str, dict[str, Any]]:
    """Name of the kernel that was being launched, and the numbers it was to be compiled for."""
    trace = error.__traceback__
    while trace is not None:
        names = trace.tb_frame.f_locals
        kernel = names.get("self")
        if isinstance(kernel, JITFunction) and trace.tb_frame.f_code.co_name == "run":
            given = names.get("kwargs", {})
            tile = {name: value for name, value in given.items() if name.startswith("BLOCK_") or name in _OPTIONS}
            return f"the kernel {kernel.__name__}", tile
        trace = trace.tb_next
    return "a kernel", {}
