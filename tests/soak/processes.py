"""The processes of a start, found through /proc: a launcher, what it started, and which of them are ranks.

A process is its number and the moment of its start together: numbers are used again, and a signal must not hit a stranger.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

PROC = Path("/proc")


class Process(NamedTuple):
    """A process. `started`: in ticks since the machine came up."""

    pid: int
    started: int


class Facts(NamedTuple):
    """What /proc says of a process that runs."""

    process: Process
    parent: int


def look_up(pid: int) -> Facts | None:
    """Look up a process by its number; None for one that is gone or only waits to be collected."""
    with suppress(OSError, ValueError, IndexError):
        # The name before the last parenthesis may hold anything.
        fields = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else Facts(Process(pid, int(fields[19])), int(fields[1]))
    return None


def descendants(pid: int) -> list[Process]:
    """Find the processes below one, nearest first, while they can still be told from those of others."""
    children: dict[int, list[Process]] = {}
    for entry in PROC.iterdir():
        if entry.name.isdigit() and (facts := look_up(int(entry.name))) is not None:
            children.setdefault(facts.parent, []).append(facts.process)
    found = list(children.get(pid, []))
    for known in found:
        found.extend(children.get(known.pid, []))
    return found


def is_alive(process: Process) -> bool:
    """Whether a process still runs."""
    facts = look_up(process.pid)
    return facts is not None and facts.process == process


def find_ranks(processes: Iterable[Process]) -> dict[int, Process]:
    """Find the ranks among processes: rank -> process. A child that a rank starts is not taken for it."""
    ranks: dict[int, Process] = {}
    for process in processes:
        with suppress(OSError):
            variables = (PROC / str(process.pid) / "environ").read_bytes().split(b"\0")
            for variable in variables:
                if variable.startswith(b"RANK="):
                    ranks.setdefault(int(variable[5:]), process)
    return ranks


def name_of(process: Process) -> str:
    """Name of the program of a process; empty for one that is gone."""
    with suppress(OSError):
        return (PROC / str(process.pid) / "comm").read_text().strip()
    return ""


def send(processes: Iterable[Process], number: signal.Signals) -> None:
    """Send a signal to processes, as far as they still run."""
    for process in processes:
        if is_alive(process):
            with suppress(ProcessLookupError):
                os.kill(process.pid, number)


def wait_until_gone(processes: Iterable[Process], seconds: float) -> list[Process]:
    """Wait for processes that are not ours to collect, and return those that still run."""
    deadline = time.monotonic() + seconds
    left = [process for process in processes if is_alive(process)]
    while left and time.monotonic() < deadline:
        time.sleep(0.05)
        left = [process for process in left if is_alive(process)]
    return left
