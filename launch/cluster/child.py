"""Child processes that answer: lines on standard input ask, lines of JSON on standard output answer.

A separate process where a setting holds for the whole process (allocator, threads, patches) or memory must be clean.

Processes that end with the launcher, however it ends: a kill -9 runs no line of ours.

A launcher that is gone supervises nothing, and what it started would hold the run directory against the start that replaces
it. On Linux the kernel sends a child a signal when the thread that started it is gone, also after an `exec`; so
the child asks for it and becomes the command.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

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
