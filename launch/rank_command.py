"""What is settled before PyTorch is imported: command lines and variables of ranks, its allocator, how its threads wait.

`python -m amfm.launch` searches the working directory first and would run a user's `amfm.py` or `amfm/` in place of ours, on
every rank. `-P` turns that off; installed packages, editable installs and PYTHONPATH stay. A clone that is not installed is
found through PYTHONPATH=src, which ranks inherit: as an absolute path where they have another working directory.

How PyTorch's allocator takes memory of a GPU, said before PyTorch is imported: later it has read its settings.

Experts over ranks get other numbers of rows in every layer and step, so what is allocated has other sizes each time. Segments of
a fixed size then fragment, and a run that fits ends after some hundred steps. Segments that grow do not.

How OpenMP's threads wait for each other, chosen from what other programs use of the processors.

Between two parallel regions a thread spins: on processors of its own that is the fastest way. Where another program needs one of
them, a thread that computes is suspended while its neighbours spin for it, and a step takes several times as long. There threads
that sleep keep most of the pace (OpenMP API 5.2, section 21.4, OMP_WAIT_POLICY). The library reads the variable once, when it is
loaded; so this looks at the processors between the program's first line and the import of PyTorch. What the user set stands, and
results do not depend on it.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path


def isolated_python() -> list[str]:
    """Start of a command line for a Python that does not search the working directory."""
    return [sys.executable, "-P"]


def rank_command(arguments: Sequence[str]) -> list[str]:
    """Command line of a process that runs an `amfm` command line."""
    return [*isolated_python(), "-m", "amfm.launch", *arguments]


def rank_variables(rank: int, num_ranks: int, ranks_per_node: int, master: str, port: int) -> dict[str, str]:
    """The variables that torchrun sets for a rank; consecutive ranks share a node, and rank 0 is met at `master`."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank % ranks_per_node),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(ranks_per_node),
        "MASTER_ADDR": master,
        "MASTER_PORT": str(port),
    }


# The second is the older name, which releases from 2.9 on still read.
VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
EXPANDABLE = "expandable_segments:True"


def expand_segments(environment: MutableMapping[str, str]) -> None:
    """Ask for segments that grow, unless the user has said anything of the allocator."""
    if not any(environment.get(name) for name in VARIABLES):
        environment[VARIABLES[0]] = EXPANDABLE


SYSTEM_TIMES = Path("/proc/stat")
NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
BY_HAND = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
OTHERS_AT_LEAST = 0.25  # processors; less is the system's own work
SHORTEST_SECONDS = 0.2  # the system counts in hundredths of a second


@dataclass(frozen=True)
class ProcessorTimes:
    """Seconds of processor time so far: of the processors that this process may use, of this process, and the clock."""

    processors: float
    own: float
    clock: float


def read_times() -> ProcessorTimes | None:
    """Read them; None where the system does not say, which is anywhere but on Linux."""
    if not SYSTEM_TIMES.exists():
        return None
    own, names = os.times(), {f"cpu{number}" for number in os.sched_getaffinity(0)}
    lines = [line.split() for line in SYSTEM_TIMES.read_text().splitlines()]
    # Of each: user, nice, system, idle, waiting for a disk, interrupts, soft interrupts, stolen by other machines.
    busy = sum(int(count) for name, *counts in lines if name in names for count in (*counts[:3], *counts[5:8]))
    return ProcessorTimes(busy / os.sysconf("SC_CLK_TCK"), own.user + own.system, time.monotonic())


STARTED = read_times()


def choose_wait_policy(environment: MutableMapping[str, str], ranks: int = 1, threads: int | None = None) -> str:
    """Let threads sleep while they wait where others use the processors; returns a line that says so, or nothing.

    threads: of each of the ranks; None is OMP_NUM_THREADS, else all processors together. Ranks do as their launcher chose.
    """
    given = environment.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    threads = threads or (int(given) if given.isdecimal() else None) or None
    is_decided = "torch" in sys.modules or "RANK" in environment or any(name in environment for name in BY_HAND)
    if is_decided or STARTED is None or threads == 1 or NVIDIA_DRIVER.exists():
        return ""
    cores, others = len(os.sched_getaffinity(0)), measure_others(STARTED)
    wanted = cores if threads is None else ranks * threads
    if others < OTHERS_AT_LEAST or others + wanted <= cores:
        return ""
    environment["OMP_WAIT_POLICY"] = "passive"
    return f"other programs use {others:.1f} of {cores} processors: threads sleep while they wait (OMP_WAIT_POLICY)"


def measure_others(start: ProcessorTimes) -> float:
    """Processors that other programs have used since `start`, on average."""
    time.sleep(max(0.0, start.clock + SHORTEST_SECONDS - time.monotonic()))
    now = read_times()
    assert now is not None, f"{SYSTEM_TIMES} was there"
    return ((now.processors - start.processors) - (now.own - start.own)) / (now.clock - start.clock)
