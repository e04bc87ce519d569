"""What files behind a URL share: an error that judges of errors know without reading stores, and a stream of ranges."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any


class NoCredentialsError(RuntimeError):
    """This machine has no credentials for an object store: for its user to set where a command starts."""


class RangeStream(io.RawIOBase):
    """`num_bytes` bytes behind `read_range(start, stop)`, to be wrapped in a buffer."""

    def __init__(self, num_bytes: int, read_range: Callable[[int, int], bytes]) -> None:
        super().__init__()
        self._num_bytes, self._read_range, self._offset = num_bytes, read_range, 0

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` with the next bytes; returns how many, 0 at the end."""
        stop = min(self._num_bytes, self._offset + len(buffer))
        if stop <= self._offset:
            return 0
        content = self._read_range(self._offset, stop)
        buffer[: len(content)] = content
        self._offset += len(content)
        return len(content)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a place; nothing is asked for before the next read."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._offset, io.SEEK_END: self._num_bytes}[whence]
        self._offset = base + offset
        return self._offset

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True
