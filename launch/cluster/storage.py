"""Shared storage that is full, read-only, stale or away for a while: the launcher waits for it, and blames no node.

What more than one node sees, or the launcher itself, is the storage's fault. A node that is the only one that cannot write is excluded.
"""

from __future__ import annotations

import errno
import os
import re
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from amfm.launch.console import say

AWAY = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ESTALE, errno.EIO, errno.ETIMEDOUT, errno.ENOTCONN, errno.ENODEV),
    *(errno.ENXIO, errno.EHOSTDOWN, errno.EREMOTEIO),
}
PROBE_BYTES = 1 << 20
LOOK_SECONDS = 5.0
REFUSES = "the storage rejects"
NUMBER = re.compile(rf"{REFUSES} .*\(errno (\d+)\)")
Found = TypeVar("Found")


def probe(folder: Path) -> bool:
    """Write a file there and read it; whether it came back as it was. Leaves nothing. Raises OSError."""
    path = folder / f"check-{socket.gethostname()}-{os.getpid()}"
    content = os.urandom(PROBE_BYTES)
    try:
        with path.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        return path.read_bytes() == content
    finally:
        path.unlink(missing_ok=True)


def describe_refusal(folder: Path, error: OSError) -> str:
    """What a node answers of storage that rejects."""
    return f"{REFUSES} {folder}: {error.strerror} (errno {error.errno})"


def blame_storage(faults: Mapping[str, Sequence[str]], run_dir: Path) -> None:
    """Raise OSError where what nodes say is the storage's fault: several say so, or this launcher sees it too."""
    said = {name: match for name, texts in faults.items() for text in texts if (match := NUMBER.match(text))}
    numbers = {name: int(match[1]) for name, match in said.items()}
    if not set(numbers.values()) & AWAY:
        return
    if len(numbers) > 1:
        number = next(iter(numbers.values()))
        raise OSError(number, f"{os.strerror(number)} on {', '.join(numbers)}", str(run_dir))
    probe(run_dir / "launch")


class StorageWait:
    """Waits for a run's storage, for `launch.storage_wait_seconds` from its first rejection to the next attempt."""

    def __init__(self, run_dir: Path, limit: float) -> None:
        self.run_dir, self.limit = run_dir, limit
        self.deadline: float | None = None

    def until(self, attempt: Callable[[], Found]) -> Found:
        """The result of `attempt`, which may raise OSError, as soon as the storage takes a file. Raises RuntimeError after the limit."""
        while True:
            try:
                folder = self.run_dir / "launch"
                folder.mkdir(parents=True, exist_ok=True)
                probe(folder)
                return attempt()
            except OSError as error:
                self.refuse(error)

    def refuse(self, error: OSError) -> None:
        """Wait a moment after a rejection of the storage; any other error, and one after the limit, is raised."""
        if error.errno not in AWAY:
            raise error
        words, now = f"{error.filename or self.run_dir}: {error.strerror}", time.monotonic()
        if self.deadline is None:
            self.deadline = now + self.limit
            say(
                f"amfm launch: {words}; waiting for the storage, {self.limit:.0f} s at most (launch.storage_wait_seconds)"
            )
        if now >= self.deadline:
            raise RuntimeError(
                f"{words}, for {self.limit:.0f} s (launch.storage_wait_seconds); free space, or mount the storage again"
            ) from error
        time.sleep(min(LOOK_SECONDS, self.deadline - now))
