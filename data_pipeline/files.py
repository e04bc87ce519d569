"""Files that survive a crash: written whole or not at all, made durable, known by a digest."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path


def digest_folder(folder: Path, *, durable: bool = False) -> str:
    """blake2b-256 over the names and contents of all files below a folder; durable also fsyncs them."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    digest = digest_files((path.relative_to(folder).as_posix(), _read(path, durable=durable)) for path in files)
    if durable:
        for path in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
            sync_folder(path)
    return digest


def digest_files(files: Iterable[tuple[str, bytes]]) -> str:
    """The same over (name, content) pairs in the order of the names."""
    digest = hashlib.blake2b(digest_size=32)
    for name, content in files:
        encoded = name.encode()
        for piece in (len(encoded).to_bytes(8, "little"), encoded, len(content).to_bytes(8, "little"), content):
            digest.update(piece)
    return digest.hexdigest()


def _read(path: Path, *, durable: bool) -> bytes:
    with path.open("rb") as file:
        content = file.read()
        if durable:
            os.fsync(file.fileno())
    return content


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file_atomically(path: Path, content: bytes) -> None:
    """Replace a file so that a reader, or a crash, sees the old content or the new one and nothing between."""
    temporary = path.with_name(f".writing-{path.name}-{os.getpid()}-{os.urandom(4).hex()}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)
