"""What reaches a terminal: text without control characters, and now and then a line on what a long piece of work is doing.

Names of files, events and messages of runs come from folders that others may write, and a terminal takes escape sequences in
them for orders (its title, its colours, its screen). And standard error is a log on a disk that fills up, or a pipe to a
program that ends: a warning that cannot be written there must not end a run, whose own log is what counts.

Reading a checkpoint, building a model or verifying an export take a blink on a laptop and many minutes at size. So
nothing is said of what ends soon; after that there is a line now and then on standard error, plain on a terminal and in
a log file alike. The work itself only calls a `Report`; a thread speaks, so that work which cannot report (a library's)
is named too.
"""

from __future__ import annotations

import re
import sys
import threading
import time
from types import TracebackType
from typing import Any, Protocol, TextIO

# C0 and C1 but tab and newline, and the marks that turn the direction of text round.
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
QUIET_SECONDS = 1.0  # of work that ends sooner nothing is said
EVERY_SECONDS = 10.0
COUNTED_BYTES = 10**9  # of less the share and the time left are noise


def printable(text: str) -> str:
    """The text with control characters written out, as Python does (`\\x1b`)."""
    return CONTROLS.sub(lambda found: ascii(found[0])[1:-1], text)


class LastingStream:
    """A text stream of which writes that fail are dropped; all else is the stream's own."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        """Write a text, if the stream takes it."""
        try:
            return self.stream.write(text)
        except (OSError, ValueError):  # ValueError: closed
            return len(text)

    def writelines(self, lines: Any) -> None:
        """Write texts, if the stream takes them."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Hand on what was written, if it can be."""
        try:
            self.stream.flush()
        except (OSError, ValueError):
            return

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


class Report(Protocol):
    """What work calls to say what it does: in words, and where it is known the bytes done and in all."""

    def __call__(self, what: str, done: int = 0, total: int = 0) -> None:
        """Note the present state; cheap."""


def silent(what: str, done: int = 0, total: int = 0) -> None:
    """A report to no one."""


class Waiting:
    """A report that a thread reads out: `NAME: WHAT: 34% of 12.3 GB, 2 min to go`. A context manager.

    speaks: false on ranks other than the first.
    """

    def __init__(
        self,
        name: str,
        *,
        speaks: bool = True,
        quiet_seconds: float = QUIET_SECONDS,
        every_seconds: float = EVERY_SECONDS,
    ) -> None:
        self.name, self.speaks = name, speaks
        self.quiet_seconds, self.every_seconds = quiet_seconds, every_seconds
        self.what, self.done, self.total, self.began = "", 0, 0, time.monotonic()
        self.ended = threading.Event()
        self.thread: threading.Thread | None = None

    def __call__(self, what: str, done: int = 0, total: int = 0) -> None:
        """Note what is done now; the clock of the time left restarts with other words."""
        if what != self.what:
            self.what, self.began = what, time.monotonic()
        self.done, self.total = done, total

    def __enter__(self) -> Waiting:
        if self.speaks:
            self.thread = threading.Thread(target=self._speak, daemon=True)
            self.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def end(self) -> None:
        """Report nothing more; may be called twice."""
        self.ended.set()
        if self.thread is not None:
            self.thread.join()
            self.thread = None

    def _speak(self) -> None:
        pause = self.quiet_seconds
        while not self.ended.wait(pause):
            pause = self.every_seconds
            if self.what:
                sys.stderr.write(printable(f"{self.name}: {self.describe()}") + "\n")
                sys.stderr.flush()

    def describe(self) -> str:
        """The present state in words."""
        seconds = time.monotonic() - self.began
        if self.total < COUNTED_BYTES:
            return f"{self.what} ({format_seconds(seconds, exact=True)} so far)"
        left = f", {format_seconds(seconds * (self.total - self.done) / self.done)} to go" if self.done else ""
        return f"{self.what}: {100 * self.done // self.total}% of {format_bytes(self.total)}{left}"


def format_seconds(seconds: float, *, exact: bool = False) -> str:
    """A duration as a person says it: 42 s, 3 min, 2 h 05 min; exact: with the seconds of less than an hour."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    if exact and seconds < 3600:
        return f"{round(seconds) // 60} min {round(seconds) % 60:02d} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def format_bytes(number: int) -> str:
    """A size in the largest decimal unit that leaves a number above one."""
    for unit, scale in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6)):
        if number >= scale:
            return f"{number / scale:.1f} {unit}"
    return f"{number:,} bytes"
