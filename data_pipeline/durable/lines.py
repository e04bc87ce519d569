"""Files of JSON lines that a crash may cut anywhere: appended whole or not at all, repaired when they are opened again.

Journals and logs are written while a run may be killed at any byte. A line is one record, so damage is confined to a line:
a reader takes what it can parse and reports the number of what it cannot. Only the end can be cut by a crash of ours, and
only it is repaired; a damaged line in the middle is someone else's, and stays to be seen.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from amfm.data_pipeline.durable.files import named
from amfm.data_pipeline.durable.foreign_files import open_regular

MAX_LINE_BYTES = 1 << 26
FLAGS = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW  # a link would lead lines elsewhere


class LineFile:
    """A file to append lines to; one process writes it.

    What a crash truncated at the end is dropped when it is opened, so that the next line does not continue it. A line
    that the disk did not take is taken back as far as it came. Raises OSError with the path, for a link too.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._open()

    def write(self, record: dict[str, Any]) -> None:
        """Append one line; it is with the operating system when this returns."""
        left = memoryview(json.dumps(record).encode() + b"\n")
        with named(self.path):
            start = os.fstat(self._descriptor).st_size
            try:
                while left:
                    left = left[os.write(self._descriptor, left) :]
            except OSError:
                os.ftruncate(self._descriptor, start)
                raise

    def sync(self) -> None:
        """Return when the disk holds every line; where it was renamed or removed, as by logrotate, a new one is begun."""
        with named(self.path):
            os.fsync(self._descriptor)
            try:
                is_same = os.path.samestat(os.lstat(self.path), os.fstat(self._descriptor))
            except FileNotFoundError:
                is_same = False
        if not is_same:
            self.close()
            self._open()

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)

    def _open(self) -> None:
        """Open the file at its path, and repair its end."""
        with named(self.path):
            self._descriptor = os.open(self.path, FLAGS, 0o666)
            self._drop_torn_end()

    def _drop_torn_end(self) -> None:
        """Cut the file after its last whole line, or add the newline that a whole last line lacks."""
        size = os.fstat(self._descriptor).st_size
        if size == 0 or os.pread(self._descriptor, 1, size - 1) == b"\n":
            return
        tail = os.pread(self._descriptor, min(size, MAX_LINE_BYTES), max(0, size - MAX_LINE_BYTES))
        torn = len(tail) - (tail.rfind(b"\n") + 1)
        if parse_line(tail[-torn:]) is not None:  # written by hand, without the last newline
            os.write(self._descriptor, b"\n")
        else:
            os.ftruncate(self._descriptor, size - torn)


def parse_line(line: bytes) -> dict[str, Any] | None:
    """Parse the object on a line; None for anything else, cut or damaged or of another kind."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def read_lines(path: Path) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """(number from 1, object or None) of every line that is not blank; lines longer than 64 MiB count as damaged."""
    with named(path), open_regular(path) as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES):
            number += 1
            is_whole = line.endswith(b"\n") or len(line) < MAX_LINE_BYTES
            while not line.endswith(b"\n") and (rest := file.readline(MAX_LINE_BYTES)):
                line = rest  # of a line that is too long only the end is looked for
            if line.strip() or not is_whole:
                yield number, parse_line(line) if is_whole else None
