"""Paths for errors of the system: those of an open file, such as a failed fsync or write, come without one.

A user who reads "No space left on device" must learn which disk; the callers' messages print `error.filename`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def named(path: Path | str) -> Iterator[None]:
    """Give an OSError out of the block this path, if it carries none."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise
