"""A process next to each rank that ends it when it gives no sign of life, although no thread of Python can run in it.

The watchdog (heartbeat.py) is a thread: it needs Python's lock, and begins with the first step. A library that holds the lock and
does not come back (a regular expression that backtracks for ever), or a pool of native threads that a fork has cut off while
the model is built, would hang a rank for good, silently where it is the only one. So the rank writes a line to this
process at each part of its start, and then the watchdog does at each of its looks: a number, the seconds until the
next must come. When none comes in time, the rank gets SIGABRT, for which faulthandler prints the stacks of all threads without
the lock, and SIGKILL a little later. A rank that is stopped (SIGSTOP, or a scheduler that suspends a job) gets its time again.

A signal that Python remembers for a main thread that never comes back is seen here too, because the number is written to the
same pipe by C code: after SIGTERM a rank has STOP_SECONDS for its next sign of life.

This file is also the program of that process: it is run by its path, apart from all packages, and imports nothing of ours.
"""

from __future__ import annotations

import faulthandler
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Self

LOOK_SECONDS = 0.5
STOP_SECONDS = 120.0  # after SIGTERM, for the next sign of life
LAST_SECONDS = 5.0  # between SIGABRT, which prints the stacks, and SIGKILL
START_MARGIN_SECONDS = 60.0  # over train.timeout_seconds: collectives that time out say more


class Guard:
    """The rank's end of its guard. A context manager, of the main thread; outside of `with` nothing happens.

    `start_seconds`: how long a part of the start may take; `stop_seconds`: what a rank gets after SIGTERM at most.
    """

    def __init__(self, rank: int, start_seconds: float, stop_seconds: float = STOP_SECONDS) -> None:
        self.rank, self.start_seconds, self.stop_seconds = rank, start_seconds, stop_seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe = self._wakeup = -1

    def __enter__(self) -> Self:
        """Start the process. Raises OSError if the system has no room for one."""
        if not faulthandler.is_enabled():
            faulthandler.enable(file=sys.__stderr__)  # type: ignore[arg-type]
        command = [sys.executable, "-I", "-S", __file__, str(os.getpid()), str(self.rank), str(self.stop_seconds)]
        # A separate session: what a terminal or a launcher sends to all ranks is not for it. It ends with the pipe.
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
        assert self._process.stdin is not None, "a pipe was asked for"
        self._pipe = self._process.stdin.fileno()
        os.set_blocking(self._pipe, False)
        self._wakeup = signal.set_wakeup_fd(self._pipe, warn_on_full_buffer=False)
        self.expect(self.start_seconds)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End it."""
        signal.set_wakeup_fd(self._wakeup, warn_on_full_buffer=False)
        self._pipe = -1
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
            self._process.wait()
            self._process = None

    def expect(self, seconds: float | None) -> None:
        """Give a sign of life: the next comes within `seconds`, None: none need come. From any thread."""
        if self._pipe >= 0:
            with suppress(BlockingIOError, BrokenPipeError):  # full: signs enough wait there; broken: it was killed
                os.write(self._pipe, b"%.3f\n" % (seconds or 0.0))

    def hearing(self, report: Callable[..., None]) -> Callable[..., None]:
        """A report (terminal.py) of a start that counts as a sign of life."""

        def note(what: str, done: int = 0, total: int = 0) -> None:
            self.expect(self.start_seconds)
            report(what, done, total)

        return note


class Signs:
    """What a rank lets its guard know; `now` are seconds of a clock that only runs forward.

    `stop_seconds`: what a rank gets after SIGTERM at most.
    """

    def __init__(self, stop_seconds: float, now: float) -> None:
        self.stop_seconds = stop_seconds
        self.limit, self.is_asked = 0.0, False
        self.last = self.looked = now

    def take(self, content: bytes, now: float) -> None:
        """Note what came through the pipe: signs of life, and the numbers of signals next to them."""
        *signs, _ = content.replace(bytes([signal.SIGTERM]), b"\nstop\n").split(b"\n")
        for sign in signs:
            if sign == b"stop":
                self.is_asked = True
            elif number := read_number(sign):
                self.limit, self.last, self.is_asked = number[0], now, False

    def find_overdue(self, now: float, is_stopped: bool) -> tuple[float, str] | None:
        """Seconds without a sign where they are too many, and since which signal; a rank that is stopped gets its time again."""
        if now - self.looked > 4 * LOOK_SECONDS or is_stopped:
            self.last = now
        self.looked = now
        allowed = min(self.limit, self.stop_seconds) if self.is_asked else self.limit
        if not self.limit or now - self.last <= allowed:
            return None
        return now - self.last, "after SIGTERM" if allowed < self.limit else ""


def guard(pid: int, rank: str, stop_seconds: float) -> None:
    """Look at process `pid`, whose signs come on standard input, until they end or it does."""
    signs = Signs(stop_seconds, time.monotonic())
    while os.getppid() == pid:
        ready, _, _ = select.select([0], [], [], LOOK_SECONDS)
        now = time.monotonic()
        if ready:
            content = os.read(0, 1 << 16)
            if not content:
                return
            signs.take(content, now)
        if overdue := signs.find_overdue(now, is_stopped(pid)):
            end(pid, rank, *overdue)
            return


def read_number(sign: bytes) -> tuple[float] | None:
    """The seconds of a line, without the numbers of other signals next to them."""
    try:
        return (float(bytes(byte for byte in sign if byte in b"0123456789.")),)
    except ValueError:
        return None


def is_stopped(pid: int) -> bool:
    """Whether a process is stopped, as far as the system tells."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] in (b"T", b"t")
    except OSError:
        return False


def end(pid: int, rank: str, seconds: float, after: str) -> None:
    """Report so, let the process print its stacks without writing its memory to the disk, and end it."""
    sys.stderr.write(
        f"amfm: rank {rank} on {socket.gethostname()}: no sign of life for {seconds:.0f} s{' ' if after else ''}{after}: a call "
        "keeps all of Python waiting, or a part of the start does not end. It is ended; its stacks:\n"
    )
    sys.stderr.flush()
    with suppress(OSError, ImportError, AttributeError):
        import resource

        resource.prlimit(pid, resource.RLIMIT_CORE, (0, 0))
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGABRT)
        deadline = time.monotonic() + LAST_SECONDS
        while time.monotonic() < deadline and os.getppid() == pid:
            time.sleep(0.05)
        if os.getppid() == pid:
            os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    # Slurm signals every process of a step, in whichever session. This one ends with its rank.
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    guard(int(sys.argv[1]), sys.argv[2], float(sys.argv[3]))
