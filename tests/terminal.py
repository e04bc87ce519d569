"""`amfm` at a terminal of its own, as a person sits at it: typed answers, Ctrl-C, and what is on the screen."""

from __future__ import annotations

import math
import os
import re
import select
import subprocess
import sys
import time
from pathlib import Path

from tests.helpers.patience import PATIENCE_SECONDS

ROOT = Path(__file__).parents[1]
CTRL_C = "\x03"
AGAIN_SECONDS = 5
_COLOURS = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")
# The terminal controls the process, so that Ctrl-C reaches its whole group; a suite that runs in the background ignores it.
BECOME_SESSION_LEADER = (
    "import fcntl, os, signal, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
    "signal.signal(signal.SIGINT, signal.SIG_DFL); os.execvp(sys.argv[1], sys.argv[1:])"
)


class Terminal:
    """One command line of amfm, called from the root of the repository."""

    def __init__(self, *arguments: str | Path) -> None:
        self.ours, theirs = os.openpty()
        command = [sys.executable, "-m", "amfm.launch", *map(str, arguments)]
        self.process = subprocess.Popen(
            [sys.executable, "-c", BECOME_SESSION_LEADER, *command],
            cwd=ROOT,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
        )
        os.close(theirs)
        self.screen = ""

    def type(self, text: str) -> None:
        """Type on its keyboard."""
        os.write(self.ours, text.encode())

    def expect(self, text: str, times: int = 1) -> None:
        """Wait until the text is on the screen so many times, wherever its lines break."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while self.screen.count(text) < times:
            assert time.monotonic() < deadline and self._read(), f"{text!r} did not come:\n{self.screen}"

    def wait_for_lines(self, path: Path, number: int) -> None:
        """Wait until a file that the command writes has so many lines."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not (path.exists() and len(path.read_text().splitlines()) >= number):
            assert time.monotonic() < deadline and self._read(), f"{path} has no {number} lines:\n{self.screen}"

    def end(self, key: str = "") -> int:
        """Press a key, read what is left, and return the exit code.

        The key is pressed again every few seconds, as a person would: a Ctrl-C that comes after Python has written a question
        and before it reads the answer is handled after the answer.
        """
        pressed = -math.inf
        while self._read():
            if key and time.monotonic() > pressed + AGAIN_SECONDS:
                self.type(key)
                pressed = time.monotonic()
        os.close(self.ours)
        return self.process.wait(PATIENCE_SECONDS)

    def close(self) -> int:
        """Close the window, which signals its processes with SIGHUP, and return the exit code."""
        os.close(self.ours)
        return self.process.wait(PATIENCE_SECONDS)

    def _read(self) -> bool:
        """Read what is there now; False if the last process has closed the terminal."""
        if select.select([self.ours], [], [], 0.05)[0]:
            try:
                self.screen += os.read(self.ours, 65536).decode(errors="replace")
            except OSError:
                return False
            self.screen = re.sub(r"\s+", " ", _COLOURS.sub("", self.screen))
        return True
