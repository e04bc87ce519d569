"""What each Triton kernel moves and multiplies, counted in the interpreter and held against its formula's minimum.

Counting needs a process that interprets from its start, so `audit_kernels` starts one: this file as a module. Bytes are
those that memory must move, each address once a launch; `requested_bytes` are all that programs ask for, which the
card's cache has to serve. Operations are those of the products, padding included, in the interpreter's tiles.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from launch.bench.kernels.case import AuditCase, Goal

FLOPS_A_SECOND, BYTES_A_SECOND = 800e12, 3.0e12


def audit_kernels(names: list[str] | None = None) -> dict[str, Any]:
    """Count every operation in a child process and return `rows` and the card that the prediction is for.

    Rows: `op`, `pass`, `shape`, `backend`, `bytes`, `minimum_bytes`, `requested_bytes`, `flops`, `minimum_flops`,
    `milliseconds` (predicted), `roofline_fraction` (the minimum's time over the predicted), `launches`, `goal`,
    `goal_ratio`, `goal_limit`, `holds` (None without a goal).

    Raises ValueError for an unknown operation, RuntimeError when the child fails, with what it said.
    """
    _find_builders(names or [])
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "launch.bench.kernels.audit", *(names or ())]
    root = Path(__file__).parents[3]
    child = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    if child.returncode:
        raise RuntimeError(f"counting in Triton's interpreter failed: {child.stderr.strip()[-2000:]}")
    return {
        "card": {"name": "H100", "flops_a_second": FLOPS_A_SECOND, "bytes_a_second": BYTES_A_SECOND},
        "predicted": True,
        "rows": json.loads(child.stdout),
    }


def audit_case(case: AuditCase) -> list[dict[str, Any]]:
    """Count one case; only in a process that interprets Triton."""
    from kernels.proof.counting import count_launches

    with count_launches() as launches:
        output = case.run(*case.leaves)
        forward = len(launches)
        if case.backward is not None:
            torch.autograd.grad(output, case.leaves, torch.ones_like(output))
    rows = [_row(case, "forward", launches[:forward], case.forward, case.forward_goal, case.library)]
    if case.backward is not None:
        rows.append(_row(case, "backward", launches[forward:], case.backward, case.backward_goal, (0, 0)))
    return rows


def _row(
    case: AuditCase,
    which: str,
    launches: list[Any],
    minimum: tuple[int, int],
    goal: Goal | None,
    library: tuple[int, int],
) -> dict[str, Any]:
    flops = sum(launch.dot_flops for launch in launches) + library[0]
    moved = sum(launch.distinct_bytes for launch in launches) + library[1]
    minimum_bytes, minimum_flops = minimum
    seconds = max(flops / FLOPS_A_SECOND, moved / BYTES_A_SECOND)
    ratio = None if goal is None else _goal_bytes(case, launches, moved) / goal.bytes
    return {
        "op": case.op,
        "pass": which,
        "shape": case.shape,
        "backend": "triton",
        "bytes": moved,
        "minimum_bytes": minimum_bytes,
        "requested_bytes": sum(launch.requested_bytes for launch in launches) + library[1],
        "flops": flops,
        "minimum_flops": minimum_flops,
        "milliseconds": seconds * 1e3,
        "roofline_fraction": max(minimum_flops / FLOPS_A_SECOND, minimum_bytes / BYTES_A_SECOND) / seconds,
        "launches": [launch.kernel for launch in launches],
        "goal": None if goal is None else goal.text,
        "goal_ratio": ratio,
        "goal_limit": None if goal is None else goal.limit,
        "holds": None if goal is None or ratio is None else ratio <= goal.limit,
    }


def _goal_bytes(case: AuditCase, launches: list[Any], moved: int) -> int:
    """The bytes that a case's goal speaks of: all that moved, or the logits read by cross-entropy."""
    if case.op != "linear_cross_entropy":
        return moved
    return sum(
        traffic.requested_read for launch in launches for name, traffic in launch.traffic.items() if name == "logits"
    )


def count_named(names: list[str]) -> Iterator[dict[str, Any]]:
    """Rows of the named cases, all where none is named. Raises ValueError for an unknown name."""
    builders = _find_builders(names)
    torch.manual_seed(0)
    for build in builders:
        for case in build():
            yield from audit_case(case)


def _find_builders(names: list[str]) -> list[Callable[[], Iterator[AuditCase]]]:
    """What makes the cases of these operations, of all where none is named."""
    from launch.bench.kernels.audit_cases import BUILDERS

    for name in names:
        if name not in BUILDERS:
            raise ValueError(f"--op {name}: there is no such operation; use {', '.join(BUILDERS)}")
    return [BUILDERS[name] for name in names or BUILDERS]


if __name__ == "__main__":
    json.dump(list(count_named(sys.argv[1:])), sys.stdout)
