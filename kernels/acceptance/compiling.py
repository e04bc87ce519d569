"""Compiles every kernel in bfloat16 for one architecture, in many processes at once.

It finds what does not compile or spills before anything runs, and so tells a broken compiler from a broken kernel.
"""

from __future__ import annotations

import functools
import importlib
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from triton.errors import TritonError

if TYPE_CHECKING:
    from amfm.kernels.proof.recorded import KernelLaunch


def compile_all(
    cases: str, architecture: int, operations: Sequence[str], jobs: int, seconds: float
) -> Iterator[dict[str, Any]]:
    """A row for each launch of these operations of the module `cases`: `kernel`, `operation` and its resources, or `fault`.

    seconds: after so long without another result what is left counts as not compiled, and is stopped.
    """
    if not operations:
        return
    left: set[tuple[str, str]] = set()
    # Compiled, not interpreted, whatever this process does; "spawn", for a fork would share Triton's threads.
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "0"
    try:
        with multiprocessing.get_context("spawn").Pool(jobs) as pool:
            named = pool.map_async(functools.partial(_names, cases, architecture), operations).get(timeout=seconds)
            left.update((operation, name) for operation, names in zip(operations, named) for name in names)
            results = pool.imap_unordered(functools.partial(_compile, cases, architecture), sorted(left))
            for _ in range(len(left)):
                try:
                    key, row = results.next(timeout=seconds)
                except multiprocessing.TimeoutError:
                    break
                left.discard(key)
                yield row
    finally:
        os.environ.pop("TRITON_INTERPRET") if before is None else os.environ.update(TRITON_INTERPRET=before)
    for operation, name in sorted(left):
        fault = f"did not compile in {seconds:g} s, or its process died"
        yield {"kernel": name, "operation": operation, "fault": fault}


@functools.cache
def _record(cases: str, operation: str) -> dict[str, KernelLaunch]:
    """What an operation launches, by name; kept, since a process compiles many."""
    from amfm.kernels.proof.recorded import record

    return record(importlib.import_module(cases).OPERATIONS[operation])


def _names(cases: str, architecture: int, operation: str) -> list[str]:
    """Names of an operation's launches that this architecture has instructions for, in a process of the pool."""
    launches = _record(cases, operation).items()
    return [name for name, launch in launches if launch.first_architecture <= architecture]


def _compile(cases: str, architecture: int, work: tuple[str, str]) -> tuple[tuple[str, str], dict[str, Any]]:
    """Compile one launch of an operation, in a process of the pool."""
    from amfm.kernels.proof.ahead_of_time import compile_ahead

    operation, name = work
    launch = _record(cases, operation)[name]
    row: dict[str, Any] = {"kernel": launch.name, "operation": operation, "fault": ""}
    try:
        compiled = compile_ahead(launch.kernel, launch.signature, launch.constants, architecture, **launch.options)
    except (TritonError, RuntimeError, ValueError) as error:
        tile = {
            **{name: value for name, value in launch.constants.items() if name.startswith("BLOCK")},
            **launch.options,
        }
        return work, row | {"fault": f"does not compile with {tile}: {' '.join(str(error).split())[:500]}"}
    return work, row | {
        "registers": compiled.registers,
        "spill_bytes": compiled.spill_bytes,
        "shared_bytes": compiled.shared_bytes,
        "wgmma": compiled.uses_wgmma,
    }
