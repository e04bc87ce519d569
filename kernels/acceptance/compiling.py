"""Compiles every kernel in bfloat16 for one architecture, in many processes at once.

It finds what does not compile or spills before anything runs, and so tells a broken compiler from a broken kernel.
"""

from __future__ import annotations

import functools
import importlib
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from typing import Any

from triton.errors import TritonError


def compile_all(
    cases: str, architecture: int, operations: Sequence[str], jobs: int, seconds: float
) -> Iterator[dict[str, Any]]:
    """A row for each launch of these operations of the module `cases`: `kernel`, `operation` and its resources, or `fault`.

    seconds: after so long without another result what is left counts as not compiled, and is stopped.
    """
    module = importlib.import_module(cases)
    work = [(name, place) for name in operations for place, _ in enumerate(module.OPERATIONS[name].launches())]
    if not work:
        return
    left = set(work)
    # Compiled, not interpreted, whatever this process does; "spawn", for a fork would share Triton's threads.
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "0"
    try:
        with multiprocessing.get_context("spawn").Pool(min(jobs, len(work))) as pool:
            results = pool.imap_unordered(functools.partial(_compile, cases, architecture), work)
            for _ in work:
                try:
                    key, row = results.next(timeout=seconds)
                except multiprocessing.TimeoutError:
                    break
                left.discard(key)
                yield row
    finally:
        os.environ.pop("TRITON_INTERPRET") if before is None else os.environ.update(TRITON_INTERPRET=before)
    for operation, place in sorted(left):
        name = [*module.OPERATIONS[operation].launches()][place].name
        yield {
            "kernel": name,
            "operation": operation,
            "fault": f"did not compile in {seconds:g} s, or its process died",
        }


def _compile(cases: str, architecture: int, work: tuple[str, int]) -> tuple[tuple[str, int], dict[str, Any]]:
    """Compile one launch of an operation, in a process of the pool."""
    from amfm.kernels.proof.ahead_of_time import compile_ahead

    operation, place = work
    launch = [*importlib.import_module(cases).OPERATIONS[operation].launches()][place]
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
