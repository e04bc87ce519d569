"""Processes that end with the launcher, however it ends: a kill -9 runs no line of ours.

A launcher that is gone supervises nothing, and what it started would hold the run directory against the start that replaces
it. On Linux the kernel sends a child a signal when the thread that started it is gone, also after an `exec`; so
the child asks for it and becomes the command.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence

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
