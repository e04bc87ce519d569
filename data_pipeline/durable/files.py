"""Files that survive a crash: written whole or not at all, made durable, known by a digest.

A file is written under a temporary name (`.writing-...`), fsynced, renamed, and its folder fsynced: POSIX renames replace a
name at once, but neither content nor name is on the disk before its fsync. A folder of many files is written the same way
as a whole, by its owner. Temporary names carry process and random bytes, so that two writers never share one, and match
UNFINISHED, so that a later call can delete what a killed one left.

Paths for errors of the system: those of an open file, such as a failed fsync or write, come without one.

A user who reads "No space left on device" must learn which disk; the callers' messages print `error.filename`.

Lock files: held by one process, freed with it however it ends, and never a way to write somewhere else.

flock, because the kernel frees it when the process ends, killed or not: a file whose presence is the lock would have to be
judged by age. The file stays after the lock is freed; deleting it would let two processes lock two files of one name.

Deletion in one place: only of files and folders with a name that this program gives, and never through a link.

Stores and checkpoints are in folders that a user names, next to files of the user. So the caller passes the pattern of the
names that it writes, and a path that does not match is our bug and not deleted. A link with such a name is removed itself;
what it points to is not ours. Where something complete stands already (a checkpoint after its commit, a store after its
manifest), a leftover that cannot be deleted is a warning and no failure: `try_to_delete`.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import IO

from blake3 import blake3

MOUNTS = Path("/proc/mounts")


def read_mounts() -> str:
    """Table of mounts; empty if the system has none."""
    return MOUNTS.read_text(encoding="utf-8", errors="replace") if MOUNTS.exists() else ""


def file_system_of(path: Path, mounts: str) -> str:
    """Type of the file system that holds an absolute path, by a table like /proc/mounts; empty without a match."""
    best, kind = -1, ""
    for line in mounts.splitlines():
        _, point, found, *_ = line.split(" ")
        point = point.replace("\\040", " ")
        # Of two mounts on one point the later one is what is seen.
        if path.is_relative_to(point) and len(point) >= best:
            best, kind = len(point), found
    return kind


def delete(path: Path, own_name: re.Pattern[str]) -> None:
    """Delete a file or a folder with everything in it. Raises OSError; nothing happens when it is absent."""
    assert own_name.fullmatch(path.name), f"{path} is not a name of ours ({own_name.pattern})"
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def try_to_delete(path: Path, own_name: re.Pattern[str]) -> list[str]:
    """Delete as `delete` does where a failure does no harm; returns a warning about what stays, or an empty list."""
    try:
        delete(path, own_name)
    except OSError as error:
        return [f"{path} cannot be deleted ({error.strerror or error}); it does no harm, delete it by hand"]
    return []


def take_lock(path: Path, *, wait: bool) -> IO[bytes] | None:
    """Hold a lock file until the result is closed; None when another process holds it and `wait` is false.

    The file is made if it is absent, and is never written or truncated: through a link that someone put in its place that
    would hit another file. A link is rejected (OSError, ELOOP). The lock belongs to the open file, which a child inherits
    by fork but not over exec.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    lock = os.fdopen(descriptor, "r+b", buffering=0)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        lock.close()
        return None
    return lock


@contextmanager
def named(path: Path | str) -> Iterator[None]:
    """Give an OSError out of the block this path, if it carries none."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


UNFINISHED = re.compile(r"\.writing-.*", re.DOTALL)  # files and folders that have no name of their own yet
SYNC_THREADS = 4  # a part has 14 files and folders; more threads cost more than they save


def check_free(out: Path) -> None:
    """Raise ValueError if a folder to be written would meet a file, a folder with content, the working directory or a dead link."""
    if out.is_symlink() and not out.exists():
        raise ValueError(f"{out} is a link that leads to nothing; name a folder that is missing or empty")
    if out.resolve() == Path.cwd():
        raise ValueError(
            f"{out} is the working directory, which would be replaced; name a folder that is missing or empty"
        )
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; name a folder that is missing or empty")
    if out.exists():
        raise ValueError(f"{out} exists and is not empty; name another folder, or remove it first")


def digest_folder(folder: Path) -> str:
    """BLAKE3 over the names and contents of all files below a folder, as hexadecimal digits; reads everything."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return digest_files((path.relative_to(folder).as_posix(), path.read_bytes()) for path in files)


def digest_files(files: Iterable[tuple[str, bytes]]) -> str:
    """BLAKE3 over (name, content) pairs, which must come in the order of the names: equal to `digest_folder` of the files."""
    digest = blake3()
    # Lengths go first: without them bytes could move between a name and a content and give the same digest.
    for name, content in files:
        encoded = name.encode()
        for piece in (len(encoded).to_bytes(8, "little"), encoded, len(content).to_bytes(8, "little"), content):
            digest.update(piece)
    return digest.hexdigest()


def write_tree(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write files by their names below a new folder, and make them and all folders durable.

    Synced in threads: the disk settles their waits together. The caller renames the folder to its final name and syncs the
    folder above. Raises OSError, and FileExistsError for a folder that is there.
    """
    parents = {""}
    for name in files:
        while name := name.rpartition("/")[0]:
            parents.add(name)
    folders = [f"{folder}/{parent}" for parent in sorted(parents)]
    for path in folders:  # each after the one that holds it
        os.mkdir(path)
    for name, content in files.items():
        with open(f"{folder}/{name}", "xb", buffering=0) as file:
            left = memoryview(content)
            # An unbuffered write may take only a part, of more than 2 GiB always.
            while left:
                left = left[file.write(left) :]
    for _ in _sync_threads(os.getpid()).map(sync, [*(f"{folder}/{name}" for name in files), *folders]):
        pass


@cache
def _sync_threads(process: int) -> ThreadPoolExecutor:
    """Threads that stay: to start them for each part takes more CPU time than the syncs.

    Keyed by the process, because a fork inherits the cached object without its threads.
    """
    return ThreadPoolExecutor(SYNC_THREADS, thread_name_prefix=f"sync-{process}")


def sync(path: Path | str) -> None:
    """Make the content of a file, or the renames in a folder, durable. Raises OSError with the path.

    Some network mounts reject it for folders (EINVAL); they make renames durable on their own.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with named(path):
            os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL or not os.path.isdir(path):
            raise
    finally:
        os.close(descriptor)


def make_folders(path: Path) -> None:
    """Make a folder and those above it durably: what is fsynced inside would go with a name that a crash takes back."""
    missing = [folder for folder in (path, *path.parents) if not folder.is_dir()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in reversed(missing):
        sync(folder.parent)


def write_file_atomically(path: Path, content: bytes) -> None:
    """Replace a file so that a reader, or a crash, sees the old content or the new one and nothing between."""
    with replacing(path) as file:
        file.write(content)


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Yield a file to write, which takes the place of another at the end of the block, as `write_file_atomically` does.

    An exception leaves the old one. The name is random and must not exist: no link that waits there is followed.
    """
    temporary = path.with_name(f".writing-{path.name}-{os.getpid()}-{os.urandom(4).hex()}")
    try:
        with named(temporary), temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)
