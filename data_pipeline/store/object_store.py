"""Folders at a URL (s3://, gs://, az://): listing, reading and writing of objects, with errors that say what to do.

Credentials, region and endpoint come from where the provider's own tools take them (AWS_ENDPOINT_URL and the like).

Files behind a URL share the error, and a stream of ranges.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amfm.data_pipeline.durable.files import named


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


SCHEMES = ("s3", "s3a", "gs", "az", "abfs", "abfss")
METADATA_REQUEST = "/latest/api/token"  # what a machine in AWS asks first for the credentials of its role
PART_BYTES = 16 * 2**20  # a larger object is sent in parts of this size, this many at a time
PARTS_AT_A_TIME = 4
MAX_COPY_BYTES = 5 * 10**9  # that S3 copies in one request
STREAM_BYTES = 2 * 2**20  # one request of a file that is read from one end to the other


def is_url(path: str) -> bool:
    """Whether a path of the configuration names an object store and no folder."""
    return "://" in path


@dataclass(frozen=True)
class ObjectFacts:
    """What a listing tells about an object; name: below the folder."""

    name: str
    num_bytes: int
    modified_ns: int


class RemoteFolder:
    """Objects below a URL. Not for forked processes: the client library has threads. Pickles to the URL.

    FileNotFoundError for an object that is not there; RuntimeError when the store cannot be reached or rejects,
    NoCredentialsError where this machine has no credentials.
    """

    def __init__(self, url: str) -> None:
        """ValueError for a scheme that is not known; nothing is asked of the network yet."""
        scheme = url.partition("://")[0]
        if scheme not in SCHEMES:
            raise ValueError(f"{url} must begin with {', '.join(f'{name}://' for name in SCHEMES)}, or be a local path")
        self.url = url.rstrip("/")
        self._process = os.getpid()
        self._client: Any = None

    def __reduce__(self) -> tuple[type[RemoteFolder], tuple[str]]:
        return RemoteFolder, (self.url,)

    def read(self, name: str) -> bytes:
        """Read a whole object, in one request."""
        with self._explained(name) as (library, client):
            return bytes(library.get(client, name).bytes())

    def read_range(self, name: str, start: int, stop: int) -> tuple[bytes, int]:
        """Read bytes [start, stop) of an object in one request, fewer where it ends; also gives the whole object's size."""
        with self._explained(name) as (library, client):
            answer = library.get(client, name, options={"range": (start, stop)})
            return bytes(answer.bytes()), int(answer.meta["size"])

    def stat(self, name: str) -> ObjectFacts:
        """Ask for the size and time of one object."""
        with self._explained(name) as (library, client):
            return _describe(library.head(client, name), name)

    def list(self) -> Iterator[ObjectFacts]:
        """List every object below the folder, a thousand per request."""
        with self._explained("") as (library, client):
            for page in library.list(client):
                yield from (_describe(item, item["path"]) for item in page)

    def open(self, name: str) -> io.BufferedReader:
        """Open an object as a file that is read in ranges of 2 MiB."""
        num_bytes = self.stat(name).num_bytes
        stream = RangeStream(num_bytes, lambda start, stop: self.read_range(name, start, stop)[0])
        return io.BufferedReader(stream, STREAM_BYTES)

    def write(self, name: str, content: bytes) -> None:
        """Write a small object, in one request: readers see the old one or the new one."""
        with self._explained(name, "written") as (library, client):
            library.put(client, name, content)

    def write_file(self, name: str, path: Path) -> None:
        """Write an object from a file, in parts where it is large; it appears as a whole. Checks the size that arrived."""
        with named(path):
            file = path.open("rb")
        with file, self._explained(name, "written") as (library, client):
            library.put(client, name, file, chunk_size=PART_BYTES, max_concurrency=PARTS_AT_A_TIME)
            sent = os.fstat(file.fileno()).st_size
        self._require_size(name, sent)

    def _require_size(self, name: str, sent: int) -> None:
        """Raise RuntimeError for an object that has another size than was sent."""
        arrived = self.stat(name).num_bytes
        if arrived != sent:
            raise RuntimeError(
                f"{self.url}/{name} has {arrived} bytes, {sent} were sent; run the same command to continue"
            )

    def copy(self, name: str, target: str) -> None:
        """Copy an object, by the store itself where one request can; a larger one comes through this machine. Checks the size."""
        size = self.stat(name).num_bytes
        with self._explained(name, "copied") as (library, client):
            if size <= MAX_COPY_BYTES:
                library.copy(client, name, target)
            else:
                with self.open(name) as source, library.open_writer(client, target, buffer_size=PART_BYTES) as sink:
                    while block := source.read(PART_BYTES):
                        sink.write(block)
        self._require_size(target, size)

    def delete(self, names: Sequence[str]) -> None:
        """Delete objects, as far as they are there."""
        for name in names:
            with suppress(FileNotFoundError), self._explained(name, "deleted") as (library, client):
                library.delete(client, name)

    @contextmanager
    def _explained(self, name: str, what: str = "read") -> Iterator[tuple[Any, Any]]:
        """Give the library and a client, and turn their errors into those of this class, with what to do."""
        import obstore  # here: a store on a disk never needs it
        from obstore.exceptions import BaseError
        from obstore.store import from_url

        if os.getpid() != self._process:
            raise RuntimeError(f"{self.url} cannot be read in a forked process; start the process by spawn")
        try:
            self._client = self._client or from_url(self.url)
            yield obstore, self._client
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{self.url}/{name} is missing") from error
        except (BaseError, OSError) as error:
            place = f"{self.url}/{name}".rstrip("/")
            if METADATA_REQUEST in str(error):  # the library asks it last, where it found no others
                raise NoCredentialsError(
                    f"{place} cannot be {what}: no credentials were found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or run on a "
                    "machine with a role, and run the same command to continue"
                ) from error
            reason = str(error).split("\n")[0]
            raise RuntimeError(
                f"{place} cannot be {what}: {reason}; check the network, the credentials and the endpoint, "
                "and run the same command to continue"
            ) from error


def _describe(item: Any, name: str) -> ObjectFacts:
    moment = item["last_modified"]
    return ObjectFacts(name, int(item["size"]), int(moment.timestamp()) * 10**9 + moment.microsecond * 1000)


def split_url(url: str) -> tuple[str, str]:
    """Split a URL into that of the folder and the name of the object in it."""
    folder, _, name = url.rpartition("/")
    return folder, name
