"""The path in errors of the system: those of an open file, such as a failed fsync, come without one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def named(path: Path | str) -> Iterator[None]:
    """An OSError out of the block carries this path, if it carries none."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise
