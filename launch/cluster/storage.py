"""Shared storage that is full, read-only, stale or away for a while: the launcher waits for it, and blames no node.

What more than one node sees, or the launcher itself, is the storage's fault. A node that is the only one that cannot write is excluded.

What every node must see as the launcher does, besides the run directory: the token store, and folders of `plugins`.

A node without such a mount would end the whole run as a wrong setting. It is excluded instead, unless all nodes lack it.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from amfm.launch.console import say

if TYPE_CHECKING:
    from amfm.pretrain.config.schema import RunConfig


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


ABSENT = "does not see the launcher's"


def list_inputs(config: RunConfig) -> dict[str, str]:
    """Paths of the files that nodes must see, with their digests; nothing for a store at a URL."""
    from amfm.data_pipeline.store.manifest import MANIFEST  # which nodes need not import for the check
    from amfm.data_pipeline.store.object_store import is_url

    files = [path for folder in config.plugins for path in Path(folder).expanduser().absolute().rglob("*.py")]
    if config.data.store is not None and config.data.synthetic is None and not is_url(config.data.store):
        files.append(Path(config.data.store, MANIFEST).absolute())
    return {str(path): digest(path) for path in files if path.is_file()}


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_inputs(inputs: Mapping[str, str]) -> Iterator[str]:
    """The files are there, and are the launcher's."""
    for path, expected in inputs.items():
        try:
            if digest(Path(path)) != expected:
                yield f"it {ABSENT} {path} but another one; mount the shared storage again"
        except OSError as error:
            yield f"it {ABSENT} {path}: {error.strerror}; mount its storage there"


def blame_inputs(faults: Mapping[str, Sequence[str]]) -> None:
    """Raise ValueError if several nodes were asked and none sees the launcher's files: the setting is at fault then."""
    texts = [text for found in faults.values() for text in found if ABSENT in text]
    if len(faults) > 1 and len(texts) >= len(faults):
        raise ValueError(f"none of {len(faults)} nodes sees the launcher's files: {texts[0]}")
