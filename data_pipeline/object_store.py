"""Folders behind a URL (s3://, gs://, az://): listing, whole objects and ranges, with errors that say what to do.

Credentials, region and endpoint come from where the provider's own tools take them (AWS_ENDPOINT_URL and the like).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

SCHEMES = ("s3", "s3a", "gs", "az", "abfs", "abfss")
STREAM_BYTES = 8 * 2**20  # one request of a file that is read from its beginning to its end


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

    FileNotFoundError for an object that isn't there; RuntimeError when the store can't be reached or refuses.
    """

    def __init__(self, url: str) -> None:
        """ValueError for a scheme that isn't known; nothing is asked of the network yet."""
        scheme = url.partition("://")[0]
        if scheme not in SCHEMES:
            raise ValueError(f"{url} must begin with {', '.join(f'{name}://' for name in SCHEMES)}, or be a local path")
        self.url = url.rstrip("/")
        self._process = os.getpid()
        self._client: Any = None

    def __reduce__(self) -> tuple[type[RemoteFolder], tuple[str]]:
        return RemoteFolder, (self.url,)

    def read(self, name: str) -> bytes:
        """A whole object."""
        with self._explained(name) as (library, client):
            return bytes(library.get(client, name).bytes())

    def read_range(self, name: str, start: int, stop: int) -> tuple[bytes, int]:
        """Bytes [start, stop) of an object in one request, fewer where it ends, and the size of the whole object."""
        with self._explained(name) as (library, client):
            answer = library.get(client, name, options={"range": (start, stop)})
            return bytes(answer.bytes()), int(answer.meta["size"])

    def size(self, name: str) -> int:
        """Bytes of an object."""
        with self._explained(name) as (library, client):
            return int(library.head(client, name)["size"])

    def list(self) -> Iterator[ObjectFacts]:
        """Every object below the folder, a thousand a request."""
        with self._explained("") as (library, client):
            for page in library.list(client):
                for item in page:
                    moment = item["last_modified"]
                    modified_ns = int(moment.timestamp()) * 10**9 + moment.microsecond * 1000
                    yield ObjectFacts(item["path"], item["size"], modified_ns)

    def open(self, name: str) -> Any:
        """An object as a file that is read in large ranges: read, readline, seek, tell."""
        with self._explained(name) as (library, client):
            return _Stream(library.open_reader(client, name, buffer_size=STREAM_BYTES), self, name)

    @contextmanager
    def _explained(self, name: str) -> Iterator[tuple[Any, Any]]:
        import obstore  # here: a store on a disk never needs it
        from obstore.exceptions import BaseError
        from obstore.store import from_url

        if os.getpid() != self._process:
            raise RuntimeError(f"{self.url} can't be read in a forked process; start the process by spawn")
        try:
            self._client = self._client or from_url(self.url)
            yield obstore, self._client
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{self.url}/{name} is missing") from error
        except (BaseError, OSError) as error:
            reason = str(error).split("\n")[0]
            raise RuntimeError(
                f"{self.url}/{name} can't be read: {reason}; check the network, the credentials and the endpoint, "
                "and run the same command to go on"
            ) from error


class _Stream:
    """A file of the client library whose errors are explained; what pyarrow, gzip and io expect of a file."""

    def __init__(self, reader: Any, folder: RemoteFolder, name: str) -> None:
        self._reader, self._folder, self._name = reader, folder, name
        self.closed = False

    def read(self, size: int = -1) -> bytes:
        with self._folder._explained(self._name):
            return bytes(self._reader.readall() if size < 0 else self._reader.read(size)) if size else b""

    def readline(self) -> bytes:
        with self._folder._explained(self._name):
            return bytes(self._reader.readline())

    def seek(self, offset: int, whence: int = 0) -> int:
        return int(self._reader.seek(offset, whence))

    def tell(self) -> int:
        return int(self._reader.tell())

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def writable(self) -> bool:
        return False

    def flush(self) -> None:
        return

    def close(self) -> None:
        self.closed = True

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[bytes]:
        while line := self.readline():
            yield line


def split_url(url: str) -> tuple[str, str]:
    """(URL of the folder, name of the object in it)."""
    folder, _, name = url.rpartition("/")
    return folder, name
