"""What reaches a terminal: text without control characters, on a stream that outlives whoever reads it.

Names of files, events and messages of runs come from folders that others may write, and a terminal takes escape sequences in
them for orders (its title, its colours, its screen). And standard error is a log on a disk that fills up, or a pipe to a
program that ends: a warning that cannot be written there must not end a run, whose own log is what counts.
"""

from __future__ import annotations

import re
from typing import Any, TextIO

# C0 and C1 but tab and newline, and the marks that turn the direction of text round.
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


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
