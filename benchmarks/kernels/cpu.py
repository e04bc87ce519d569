"""Operations side by side on this machine's CPU: ours against transformers' PyTorch code, forward and backward.

All variants of an operation get the same inputs in the same dtype and take turns, so that a machine that drifts slows
all of them; a figure is a median. Element-wise operations of ours are timed a second time as `train.compile` makes them,
fused, if there is a C++ compiler; what compiles does so in the warm-up, outside of the timed rounds. Before each pass
all threads write a tensor larger than a cache, so that neither warm caches nor sleeping threads are timed.

What the C library does with freed memory weighs as much as the arithmetic, so both ways are timed, each in a separate
process, in turns: `returned`, glibc as it comes and as transformers' trainer runs, and `kept`, as `amfm train` runs.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch

from amfm.kernels.proof.operations import check_names
from amfm.launch.bench.kernels import describe_hardware
from amfm.launch.cluster.child import Child
from benchmarks import ROOT
from benchmarks.freed_memory import KEPT, RETURNED, choose_treatments
from benchmarks.kernels.cpu_rounds import DTYPES, FUSED, can_be_compiled
from benchmarks.kernels.operations import ON_HOST

PASSES = ("forward", "backward", "both")


def bench_cpu(
    names: list[str] | None = None, *, rounds: int, num_threads: int | None, report: Callable[[str], None]
) -> dict[str, Any]:
    """Time every case and return `rows` (for each operation, dtype, treatment of memory, variant and pass) and the hardware.

    names: the operations to time, all when None. Rows: `op`, `pass` (forward, backward, both), `shape`, `dtype`, `memory`
    (returned, kept; the environment's name where it has allocator settings of its own), `backend` (ours_torch,
    ours_compiled for the operations of `FUSED` if there is a C++ compiler, or the peer's name), `milliseconds`,
    `roofline_fraction` (None: no roofline is known for this processor), `ratio` (how many times as long as ours_torch it
    takes with memory treated alike, None for that one), `ratio_as_trained` (of peers with memory returned: how many
    times as long as ours_torch takes with memory kept), `relative_difference` of outputs and gradients from ours_torch.

    Raises ValueError for an unknown operation, RuntimeError if variants disagree: they would not be the same work.
    """
    check_names(names, ON_HOST)
    before = torch.get_num_threads()
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    rows = []
    memories, remarks = choose_treatments()
    try:
        for op in names or ON_HOST:
            rows += _bench_operation(op, memories, rounds, report)
        hardware = describe_hardware()
    finally:
        torch.set_num_threads(before)
    return {"rounds": rounds, "hardware": hardware, "rows": rows, "remarks": remarks}


def _bench_operation(
    op: str, memories: tuple[str, ...], rounds: int, report: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Rows of one operation: a child for each treatment of memory, all dtypes one after the other."""
    rows = []
    missing = op in FUSED and not can_be_compiled(op)
    remark = ", ours_compiled left out: there is no C++ compiler (install g++)" if missing else ""
    with ExitStack() as stack:
        children = {memory: stack.enter_context(_start(op, memory, rounds)) for memory in memories}
        for dtype in DTYPES:
            report(f"timing {op} in {dtype}{remark}")
            cases = {memory: child.ask() for memory, child in children.items()}
            for case in cases.values():
                if "error" in case:
                    raise RuntimeError(case["error"])
            seconds: dict[str, list[dict[str, tuple[float, float]]]] = {memory: [] for memory in memories}
            for _ in range(rounds):
                # Treatments take turns within a round, so that both see the machine in the same state.
                for memory, child in children.items():
                    seconds[memory].append(child.ask())
            medians = {memory: _medians(seconds[memory]) for memory in memories}
            rows += [row for memory in memories for row in _rows(op, dtype, memory, cases[memory], medians)]
    return rows


def _start(op: str, memory: str, rounds: int) -> Child:
    """Start a process that times one operation under one treatment of memory."""
    settings = {"op": op, "rounds": rounds, "threads": torch.get_num_threads(), "keep_freed_memory": memory == KEPT}
    return Child("benchmarks.kernels.cpu_rounds", json.dumps(settings), root=ROOT)


def _medians(rounds: list[dict[str, tuple[float, float]]]) -> dict[str, tuple[float, float, float]]:
    """Median seconds of forward, backward and both, by variant."""
    return {
        name: (
            statistics.median(times[name][0] for times in rounds),
            statistics.median(times[name][1] for times in rounds),
            statistics.median(sum(times[name]) for times in rounds),
        )
        for name in rounds[0]
    }


def _rows(
    op: str, dtype: str, memory: str, case: dict[str, Any], medians: dict[str, dict[str, tuple[float, float, float]]]
) -> list[dict[str, Any]]:
    """Rows of one treatment of memory; `medians` has those of all, by treatment and variant."""
    as_we_train = medians[KEPT]["ours"] if memory == RETURNED and KEPT in medians else None
    return [
        {
            "op": op,
            "pass": which,
            "shape": case["shape"],
            "dtype": dtype,
            "memory": memory,
            "backend": "ours_torch" if name == "ours" else name,
            "milliseconds": median * 1e3,
            "roofline_fraction": None,
            "ratio": None if name == "ours" else median / medians[memory]["ours"][place],
            "ratio_as_trained": median / as_we_train[place] if as_we_train and not name.startswith("ours") else None,
            "relative_difference": case["differences"][name],
        }
        for name, times in medians[memory].items()
        for place, (which, median) in enumerate(zip(PASSES, times, strict=True))
    ]
