"""Reading files that someone else may have written: manifests, indexes, configurations, descriptions.

Checked by three rules in one place: a name inside a file leads to a file below the folder and nowhere else; the size is
looked at before anything is read; and whatever is not as it must be (no JSON, `null`, `[]`, a key that is missing or of
another type) gives one message that names the file, as the error that the caller asks for.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Any, TypeVar

from amfm.data_pipeline.durable.files import named

MAX_JSON_BYTES = 1 << 28  # a manifest of MAX_PARTS has most of it
MAX_WORD_BYTES = 4096
Error = Callable[[str], Exception]
Value = TypeVar("Value")


def inside(folder: Path, name: object, error: Error = ValueError) -> Path:
    """Resolve a name that a file gave to a path below the folder; rejects absolute names, `..` and what is not a name.

    Links below the folder are followed: who made the folder made them (model hubs keep files behind links).
    """
    parts = PurePosixPath(name).parts if isinstance(name, str) else ()
    if not parts or parts[0] == "/" or ".." in parts or "\0" in str(name):
        raise error(
            f"{folder} names the file {name!r:.200}, which is not one below it; the folder was edited or damaged"
        )
    return folder / str(name)


def open_regular(path: Path) -> IO[bytes]:
    """Open a file to read. Raises OSError for what is not a regular file: a FIFO would wait for a writer without end."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "is not a regular file", str(path))
    return os.fdopen(descriptor, "rb")


def read_bounded(path: Path, max_bytes: int = MAX_JSON_BYTES, error: Error = ValueError) -> bytes:
    """Read a file of at most `max_bytes`, whose size is checked before. Raises OSError with the path when it cannot be read."""
    with named(path), open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > max_bytes:
            raise error(f"{path} has {size} bytes, more than the {max_bytes} that such a file may have")
        return file.read(
            max(size, 1)
        )  # not as much as it may have, for which room is made; one byte shows what the storage rejects


def read_word(path: Path) -> str:
    """Read a file that holds one name or number. Raises OSError when it cannot be read, ValueError when it is not text."""
    try:
        return read_bounded(path, MAX_WORD_BYTES).decode().strip()
    except UnicodeDecodeError as problem:
        raise ValueError(f"{path} is damaged: it must hold one word, and is not UTF-8") from problem


def parse_object(content: bytes, path: Path | str, error: Error = ValueError) -> dict[str, Any]:
    """Parse the content of a file as a JSON object; `path` is for messages. Raises `error` for anything else."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as problem:
        raise error(f"{path} is damaged: it is not valid JSON ({problem})") from problem
    if not isinstance(value, dict):
        raise error(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value


def read_object(path: Path, *, max_bytes: int = MAX_JSON_BYTES, error: Error = ValueError) -> dict[str, Any]:
    """Read and parse a file that holds a JSON object. Raises OSError when it cannot be read, else `error`."""
    return parse_object(read_bounded(path, max_bytes, error), path, error)


@contextmanager
def understood(path: Path | str, error: Error = ValueError) -> Iterator[None]:
    """Turn the errors of code that picks a record apart (a missing key, another type) into one message with the path."""
    try:
        yield
    except (KeyError, IndexError, TypeError, AttributeError) as problem:
        what = f"{problem} is missing" if isinstance(problem, KeyError) else str(problem)
        raise error(f"{path} is not as its format asks: {what}; it was edited or damaged") from problem


def take(record: Mapping[str, Any], key: str, kind: type[Value], path: Path | str, error: Error = ValueError) -> Value:
    """Take the value of a key, which must be there and of the kind; raises `error` otherwise."""
    value = record.get(key)
    # bool is an int to Python and no number to a format.
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        found = "is missing" if key not in record else f"is {value!r:.80}"
        raise error(f"{path}: {key} {found}, it must be {kind.__name__}; the file was edited or damaged")
    return value
