"""JSON on disk that someone else may have written or a crash may have cut: manifests, indexes, descriptions, and files of lines.

Checked by three rules in one place: a name inside a file leads to a file below the folder and nowhere else; the size is
looked at before anything is read; and whatever is not as it must be (no JSON, `null`, `[]`, a key that is missing or of
another type) gives one message that names the file, as the error that the caller asks for.

Files of JSON lines are appended whole or not at all, and repaired when they are opened again.
Journals and logs are written while a run may be killed at any byte. A line is one record, so damage is confined to a line:
a reader takes what it can parse and reports the number of what it cannot. Only the end can be cut by a crash of ours, and
only it is repaired; a damaged line in the middle is someone else's, and stays to be seen.
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
