"""A process of a benchmark's own: it gives one line of JSON for each line that it reads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from launch.console import UNUSED_LIBRARIES


class Child:
    """`python -m MODULE ARGUMENTS` behind pipes, killed where the `with` block ends.

    It gets a line for each `start` and answers with one line of JSON. RuntimeError where it ends instead.
    """

    def __init__(self, module: str, *arguments: str) -> None:
        command = [sys.executable, "-W", f"ignore:{UNUSED_LIBRARIES}", "-m", module, *arguments]
        self._what = " ".join(["python", "-m", module])
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def start(self) -> None:
        """Let it work on its next answer."""
        assert self._process.stdin is not None, "the pipe was asked for"
        try:
            self._process.stdin.write("go\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._early_end() from None

    def receive(self) -> Any:
        """Wait for an answer."""
        assert self._process.stdout is not None, "the pipe was asked for"
        line = self._process.stdout.readline()
        if not line:
            raise self._early_end()
        return json.loads(line)

    def _early_end(self) -> RuntimeError:
        self._end()
        return RuntimeError(f"{self._what} ended early; its message is above")

    def _end(self) -> None:
        self._process.kill()
        self._process.wait()

    def ask(self) -> Any:
        """Start and receive."""
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
