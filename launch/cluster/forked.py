"""Ranks that are forked from this process after it has imported what all of them need: many of them start in seconds.

An import of torch, DeepSpeed and Megatron-core takes a core for some ten seconds. Sixteen ranks on the cores of one machine would
each do it, and wait for each other's; a forked rank has it already, and shares the memory. Only where that is safe: on Linux,
while no GPU's driver is awake (it does not survive a fork), and while this process has one thread: a fork copies the locks of
the others and not the threads. OpenMP is the one that bites: torch computes with a pool of threads that a forked process believes
to have and waits for, for ever. So a process that has computed is never forked (`has_other_threads` counts the system's
threads, of which Python knows only its own); its ranks are separate processes.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO

AMD_DRIVER = Path("/dev/kfd")  # which cannot be asked whether it is awake
NOT_INITIALIZED = 3  # CUDA's answer before anyone has woken its driver
SETTLE_SECONDS = 0.25
BUG = 1  # the interpreter's own exit code for an exception


def can_fork() -> bool:
    """Whether ranks may be forked from this process as it is now."""
    return not why_not_fork()


def why_not_fork() -> str:
    """Why ranks may not be forked from this process as it is now, empty if they may."""
    if not sys.platform.startswith("linux"):
        return f"no forks on {sys.platform}"
    if AMD_DRIVER.exists() or is_cuda_awake():
        return "a GPU's driver does not survive a fork"
    return "this process has other threads" if threading.active_count() > 1 or has_other_threads() else ""


def is_cuda_awake() -> bool:
    """Whether this process has initialized NVIDIA's driver, which then works in no fork of it; asking does not wake it."""
    if "libcuda.so" not in Path("/proc/self/maps").read_text():
        return False
    return ctypes.CDLL("libcuda.so.1").cuDeviceGetCount(ctypes.byref(ctypes.c_int())) != NOT_INITIALIZED


def name_process(name: str) -> None:
    """Name this process for `ps` and `pkill` (15 characters): a fork has the command line of what it was forked from."""
    set_name = 15
    ctypes.CDLL(None).prctl(set_name, name.encode(), 0, 0, 0)


def has_other_threads() -> bool:
    """Whether this process has threads that a fork would cut off, of any library. Linux only.

    numpy's BLAS starts some at its import, ends them before each fork, and starts them again when it needs them. So a fork that does nothing
    does not affect those that do not know of it.
    """
    if count_threads() == 1:
        return False
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    deadline = time.monotonic() + SETTLE_SECONDS  # the system takes an ended thread off its list a moment later
    while count_threads() > 1:
        if time.monotonic() > deadline:
            return True
        time.sleep(0.005)
    return False


def count_threads() -> int:
    """The system's threads of this process."""
    return len(os.listdir("/proc/self/task"))


class ForkedRank:
    """A rank that runs a function in a fork of this process, with the parts of `subprocess.Popen` that launchers use.

    environment: its variables. is_first: it keeps the terminal; standard output of the others is dropped, and standard error
    comes through `stderr`. `resets`: signals that get their defaults back. The function's result is the exit code.
    """

    def __init__(
        self, run: Callable[[], int], environment: Mapping[str, str], resets: Sequence[int], *, is_first: bool
    ) -> None:
        self.returncode: int | None = None
        self.stderr: IO[bytes] | None = None
        reader, writer = (None, None) if is_first else os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            become_rank(run, environment, resets, writer)
        if reader is not None and writer is not None:
            os.close(writer)
            self.stderr = os.fdopen(reader, "rb")

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        if self.returncode is None:
            found, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if found else None
        return self.returncode

    def wait(self) -> int:
        """Wait for its end and return the exit code."""
        if self.returncode is None:
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send it a signal, if it runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill it, if it runs."""
        self.send_signal(signal.SIGKILL)


RankProcess = subprocess.Popen[bytes] | ForkedRank


def become_rank(
    run: Callable[[], int], environment: Mapping[str, str], resets: Sequence[int], errors: int | None
) -> None:
    """Be the rank, in the child after the fork, and end the process; `errors`: where its standard error goes."""
    code, given = BUG, dict(environment)  # a copy: it may be this process's own, which is cleared
    try:
        for number in resets:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        os.environ.clear()
        os.environ.update(given)
        if errors is not None:
            nothing = os.open(os.devnull, os.O_RDWR)
            for source, target in ((nothing, 0), (nothing, 1), (errors, 2)):
                os.dup2(source, target)
            os.close(nothing)
            os.close(errors)
        code = run()
        # As the interpreter ends, and forked children of multiprocessing: executors hear that no work will come, as those of
        # torch.compile, whose threads would wait for it for ever; then threads that are not daemons are waited for.
        threading._shutdown()  # type: ignore[attr-defined]
    finally:
        if sys.exc_info()[0] is not None:
            traceback.print_exc()
        # Not by an orderly exit: what the launcher registered for its own end is none of a rank's business.
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except (OSError, ValueError):
                code = code or BUG
        os._exit(code)
