"""Audit Triton kernels without a GPU: bytes moved and FLOPs counted in the interpreter, against the formula's minimum.

Counting needs a process that interprets from its start, so `audit_kernels` starts one: this file as a module. Bytes are
those that memory must move, each address once a launch; `requested_bytes` are all that programs ask for, which the
GPU's cache has to serve. FLOPs are those of the products, padding included, in the interpreter's tiles. Times are
predicted by the roofline of an H100 at rates that it reaches in practice, not at its peaks.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import torch

from amfm.kernels.acceptance.child import BYTES_A_SECOND, FLOPS_A_SECOND
from amfm.kernels.cases import NOTHING, CountedProblem, Goal, Minimum
from amfm.kernels.proof.operations import check_names
from benchmarks import ROOT
from benchmarks.kernels.operations import OPERATIONS


def audit_kernels(names: list[str] | None = None) -> dict[str, Any]:
    """Count every operation in a child process and return `rows` and the GPU that the prediction is for.

    Rows: `op`, `pass`, `shape`, `backend`, `bytes`, `minimum_bytes`, `requested_bytes`, `flops`, `minimum_flops`,
    `milliseconds` (predicted), `roofline_fraction` (the minimum's time over the predicted), `launches`, `goal`,
    `goal_ratio`, `goal_limit`, `holds` (None without a goal).

    Raises ValueError for an unknown operation, RuntimeError when the child fails, with what it said.
    """
    check_names(names, OPERATIONS)
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "benchmarks.kernels.audit", *(names or ())]
    child = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if child.returncode:
        raise RuntimeError(f"counting in Triton's interpreter failed: {child.stderr.strip()[-2000:]}")
    return {
        "card": {"name": "H100", "flops_a_second": FLOPS_A_SECOND, "bytes_a_second": BYTES_A_SECOND},
        "predicted": True,
        "rows": json.loads(child.stdout),
    }


def count_problem(counted: CountedProblem) -> list[dict[str, Any]]:
    """A row for each pass of one problem. Needs a process that interprets Triton."""
    from benchmarks.kernels.counting import count_launches

    problem = counted.problem
    with count_launches() as launches:
        output = problem.on("triton")(*problem.tensors)
        forward = len(launches)
        if counted.has_backward:
            torch.autograd.grad(output, problem.tensors, torch.ones_like(output))
    rows = [_row(counted, "forward", launches[:forward], problem.forward, counted.forward_goal, counted.library)]
    if counted.has_backward:
        rows.append(_row(counted, "backward", launches[forward:], problem.backward, counted.backward_goal))
    return rows


def _row(
    counted: CountedProblem,
    which: str,
    launches: list[Any],
    minimum: Minimum,
    goal: Goal | None,
    library: Minimum = NOTHING,
) -> dict[str, Any]:
    """Figures of one pass: what its launches moved and multiplied, with library products added, vs. the minimum."""
    flops = sum(launch.dot_flops for launch in launches) + library.operations
    moved = sum(launch.distinct_bytes for launch in launches) + library.bytes
    seconds = max(flops / FLOPS_A_SECOND, moved / BYTES_A_SECOND)
    ratio = None if goal is None else _goal_bytes(goal, launches, moved) / goal.bytes
    return {
        "op": counted.op,
        "pass": which,
        "shape": counted.problem.shape,
        "backend": "triton",
        "bytes": moved,
        "minimum_bytes": minimum.bytes,
        "requested_bytes": sum(launch.requested_bytes for launch in launches) + library.bytes,
        "flops": flops,
        "minimum_flops": minimum.operations,
        "milliseconds": seconds * 1e3,
        "roofline_fraction": max(minimum.operations / FLOPS_A_SECOND, minimum.bytes / BYTES_A_SECOND) / seconds,
        "launches": [launch.kernel for launch in launches],
        "goal": None if goal is None else goal.text,
        "goal_ratio": ratio,
        "goal_limit": None if goal is None else goal.limit,
        "holds": None if goal is None or ratio is None else ratio <= goal.limit,
    }


def _goal_bytes(goal: Goal, launches: list[Any], moved: int) -> int:
    """Bytes that a goal limits: all that moved, or what programs ask to read of one argument."""
    if goal.argument is None:
        return moved
    return sum(launch.traffic[goal.argument].requested_read for launch in launches if goal.argument in launch.traffic)


def count_named(names: list[str]) -> Iterator[dict[str, Any]]:
    """Rows of the named operations, of all if none is named. Raises ValueError for an unknown name."""
    check_names(names, OPERATIONS)
    torch.manual_seed(0)
    for name in names or OPERATIONS:
        for counted in OPERATIONS[name].counted():
            yield from count_problem(counted)


if __name__ == "__main__":
    json.dump(list(count_named(sys.argv[1:])), sys.stdout)
