"""Files that survive a crash: written whole or not at all, made durable, known by a digest.

A file is written under a temporary name (`.writing-...`), fsynced, renamed, and its folder fsynced: POSIX renames replace a
name at once, but neither content nor name is on the disk before its fsync. A folder of many files is written the same way
as a whole, by its owner. Temporary names carry process and random bytes, so that two writers never share one, and match
UNFINISHED, so that a later call can delete what a killed one left.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import IO

from blake3 import blake3

from amfm.data_pipeline.durable.naming import named

UNFINISHED = re.compile(r"\.writing-.*", re.DOTALL)  # files and folders that have no name of their own yet
SYNC_THREADS = 4  # a part has 14 files and folders; more threads cost more than they save


def check_free(out: Path) -> None:
    """Raise ValueError where a folder to be written would meet a file, a folder with content, or the working directory."""
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

    Some network mounts refuse it for folders (EINVAL); they make renames durable on their own.
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
