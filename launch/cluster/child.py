"""Processes of a launcher: children that answer, commands that end with it, and ranks that are forked from it.

Children that answer: lines on standard input ask, lines of JSON on standard output answer. A separate process where a setting
holds for the whole process (allocator, threads, patches) or memory must be clean.

A launcher that is gone supervises nothing, and what it started would hold the run directory against the start that replaces
it; a kill -9 runs no line of ours. On Linux the kernel sends a child a signal when the thread that started it is gone, also
after an `exec`; so the child asks for it and becomes the command.

An import of torch, DeepSpeed and Megatron-core takes a core for some ten seconds. Sixteen ranks on the cores of one machine would
each do it, and wait for each other's; a forked rank has it already, and shares the memory. Only where that is safe: on Linux,
while no GPU's driver is awake (it does not survive a fork), and while this process has one thread: a fork copies the locks of
the others and not the threads. OpenMP is the one that bites: torch computes with a pool of threads that a forked process believes
to have and waits for, for ever. So a process that has computed is never forked (`has_other_threads` counts the system's
threads, of which Python knows only its own); its ranks are separate processes.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from amfm.launch.console import UNUSED_LIBRARIES

BECOME = (
    "import ctypes, os, sys\n"
    f"ctypes.CDLL(None).prctl(1, {int(signal.SIGTERM)})\n"  # PR_SET_PDEATHSIG
    "if os.getppid() != int(sys.argv[1]):\n"
    "    sys.exit('the launcher is gone')\n"
    "try:\n"
    "    os.execvp(sys.argv[2], sys.argv[2:])\n"
    "except OSError as error:\n"
    "    sys.exit(f'amfm: {sys.argv[2]} does not start: {error.strerror}')\n"
)


def ending_with_us(command: Sequence[str]) -> list[str]:
    """The command as a child that gets SIGTERM when this process dies; unchanged where the system has no such thing.

    Start it from the main thread: the signal is tied to the thread.
    """
    if not sys.platform.startswith("linux"):
        return list(command)
    return [sys.executable, "-I", "-S", "-c", BECOME, str(os.getpid()), *command]


class Child:
    """`python -m MODULE ARGUMENTS` behind pipes, killed where the `with` block ends, or where this process does.

    Make it in the main thread. It gets a line for each `start` and answers with lines of JSON. RuntimeError if it ends
    instead. `quiet`: what it prints to standard error is shown only then. `root`: where its package is, if it is not installed.
    """

    def __init__(self, module: str, *arguments: str, quiet: bool = False, root: Path | None = None) -> None:
        command = [sys.executable, "-P", "-W", f"ignore:{UNUSED_LIBRARIES}", "-m", module, *arguments]
        environment = dict(os.environ)
        if root is not None:
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(root), environment.get("PYTHONPATH"))))
        self._what = " ".join(["python", "-m", module])
        self._errors = tempfile.TemporaryFile("w+") if quiet else None  # noqa: SIM115 (lives as long as the process)
        self._process = subprocess.Popen(
            ending_with_us(command),
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def start(self, line: str = "go") -> None:
        """Ask for the next answer with a line, without waiting. Raises RuntimeError if the process has ended."""
        assert self._process.stdin is not None, "the pipe was asked for"
        try:
            self._process.stdin.write(f"{line}\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._early_end() from None

    def receive(self) -> Any:
        """Wait for an answer and decode it. Raises RuntimeError if the process ends instead."""
        assert self._process.stdout is not None, "the pipe was asked for"
        line = self._process.stdout.readline()
        if not line:
            raise self._early_end()
        return json.loads(line)

    def _early_end(self) -> RuntimeError:
        """Error for a child that ended, with the end of what it wrote to standard error if that was kept."""
        self._end()
        if self._errors is None:
            return RuntimeError(f"{self._what} ended early; its message is above")
        self._errors.seek(0)
        return RuntimeError(f"{self._what} ended early: {self._errors.read()[-4000:].strip()}")

    def _end(self) -> None:
        self._process.kill()
        self._process.wait()

    def ask(self) -> Any:
        """Start, and receive the answer."""
        self.start()
        return self.receive()


def open_answers() -> Callable[[object], None]:
    """In the child: a function that answers with one line of JSON. What libraries print goes to standard error from now on."""
    lines = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def answer(found: object) -> None:
        lines.write(json.dumps(found) + "\n")
        lines.flush()

    return answer


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
