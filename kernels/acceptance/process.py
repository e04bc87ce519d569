"""Runs a part of the acceptance in a separate process, with a limit on its time.

Why: an illegal access poisons a CUDA context for good, a miscompiled loop may never end, and a compiler may take the process
with it. None of that may take the other operations along, so each has its own process, and what it had found stands.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amfm.kernels.runtime.first_use import CHECKING_VARIABLE, child_command

_ROOT = Path(__file__).parents[3]
# What of a child's standard error is repeated.
_LAST_CHARACTERS = 800


@dataclass(frozen=True)
class Finished:
    """Lines that a child wrote, and why it did not end well ("" where it did)."""

    lines: list[dict[str, Any]]
    fault: str


def run_child(
    settings: dict[str, Any], seconds: float, *, interpreted: bool = False, before: list[str] | None = None
) -> Finished:
    """Run the child with these settings for at most this many seconds. interpreted: in Triton's interpreter.

    before: the command that runs it, such as a sanitizer. Everything that the child started ends with it.
    """
    # What is accepted here needs no check at its first use.
    environment = os.environ | {"TRITON_INTERPRET": "1" if interpreted else "0", CHECKING_VARIABLE: "1"}
    command = [*(before or []), *child_command(settings)]
    child = subprocess.Popen(
        command, cwd=_ROOT, env=environment, text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    try:
        out, errors = child.communicate(timeout=seconds)
        ended = _describe_end(child.returncode, errors)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        out, errors = child.communicate()
        ended = f"was stopped after {seconds:g} s"
    lines = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    return Finished(lines, ended and f"{_place(lines)}{ended}")


def _describe_end(code: int, errors: str) -> str:
    """What an exit code means, with the end of what the child wrote to standard error."""
    if code == 0:
        return ""
    how = f"ended with signal {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    said = errors.strip()[-_LAST_CHARACTERS:]
    return f"{how}: {said}" if said else how


def _place(lines: list[dict[str, Any]]) -> str:
    """The trial that a child had begun and not finished."""
    if lines and "begun" in lines[-1]:
        return f"{lines[-1]['begun']}: "
    return ""
