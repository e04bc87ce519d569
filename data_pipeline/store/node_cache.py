"""Parts of a remote store on this node's disk: fetched by blocks, checked by digest, the least recently used go first.

All processes of a node share the folder. A block is fetched once per node and serves the windows that are in it, so a
sample costs a request only when it opens a new block.

There is no index to keep consistent: a block's file is named by a digest of what it holds (URL, content, block size,
number), its time says when it was used last, and the sizes are measured by listing. A process may be killed at any point: a
file appears by rename when it is whole, and carries the digest of its bytes at its end. Locks keep two processes from
fetching the same block; they are not needed for correctness.
"""

from __future__ import annotations

import hashlib
import logging
import os
import stat
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from amfm.data_pipeline.durable.files import take_lock, write_file_atomically
from amfm.data_pipeline.store.object_store import RemoteFolder
from amfm.data_pipeline.store.shards import DamagedError

DIGEST_BYTES = 16
MAX_OPEN_BLOCKS = 128
NUM_LOCKS = 64
FETCHES_PER_SCAN = 32  # other processes fill the folder too: so often its size is measured and not only counted
KEPT_AFTER_EVICTION = 0.9

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CacheSettings:
    """Where blocks are kept, how many bytes of them, and how many bytes one block has."""

    folder: str
    max_bytes: int
    block_bytes: int


class BlockCache:
    """Files of one block and its BLAKE3 digest each. A damaged one is fetched again; a full disk is a RuntimeError."""

    def __init__(self, settings: CacheSettings) -> None:
        self.settings = settings
        self._folder = Path(settings.folder).expanduser() / "blocks"
        self._open: OrderedDict[str, int] = OrderedDict()
        self._checked: set[str] = set()
        self._bytes = 0
        self._fetches = 0

    def open_block(self, remote: RemoteFolder, name: str, content: str, size: int, number: int) -> int:
        """Descriptor of a file that begins with block `number` of an object of `size` bytes.

        content: digest of what the object holds, so that an object that was replaced is not taken from the cache.
        DamagedError when the object is missing or has another size.
        """
        key = self._key(remote, name, content, number)
        if key in self._open:
            self._open.move_to_end(key)
            return self._open[key]
        path = self._path(key)
        own_folder(self._folder)
        descriptor = self._open_checked(path, key)
        if descriptor is None:
            with self._locked(f"{int(key[:8], 16) % NUM_LOCKS:02d}"):
                descriptor = self._open_checked(path, key)  # another process may have fetched it meanwhile
                if descriptor is None:
                    descriptor = self._keep(path, _fetch(remote, name, size, number, self.settings.block_bytes))
                    self._checked.add(key)
            self._count_fetch()
        self._open[key] = descriptor
        if len(self._open) > MAX_OPEN_BLOCKS:
            os.close(self._open.popitem(last=False)[1])
        return descriptor

    def drop(self, remote: RemoteFolder, name: str, content: str, number: int) -> None:
        """Remove a block from this process and from the folder, if it is there."""
        key = self._key(remote, name, content, number)
        if key in self._open:
            os.close(self._open.pop(key))
        self._checked.discard(key)
        self._path(key).unlink(missing_ok=True)

    def _key(self, remote: RemoteFolder, name: str, content: str, number: int) -> str:
        """Name of a block: whatever would change its bytes gives another one."""
        facts = f"{remote.url}/{name}\n{content}\n{self.settings.block_bytes}\n{number}"
        return hashlib.blake2b(facts.encode(), digest_size=20).hexdigest()

    def _path(self, key: str) -> Path:
        return self._folder / key[:2] / key

    def close(self) -> None:
        """Close all blocks."""
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()

    def _open_checked(self, path: Path, key: str) -> int | None:
        """Open a block, its digest compared when this process opens it for the first time; None if it must be fetched."""
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        if key not in self._checked:
            content = os.pread(descriptor, os.fstat(descriptor).st_size, 0)
            if _digest(content[:-DIGEST_BYTES]) != content[-DIGEST_BYTES:]:
                logger.warning("%s is damaged; the block is fetched again", path)
                os.close(descriptor)
                return None
            self._checked.add(key)
        os.utime(descriptor)  # least recently used: by the time of the file
        return descriptor

    def _keep(self, path: Path, block: bytes) -> int:
        """Write a block and return a descriptor of it, which stays good when another process evicts the file."""
        temporary = path.with_name(f".writing-{path.name}-{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(block + _digest(block))
            descriptor = os.open(temporary, os.O_RDONLY | os.O_CLOEXEC)
            os.replace(temporary, path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise RuntimeError(
                f"data.cache.folder={self.settings.folder} cannot store a block ({error.strerror}); free space, lower "
                "data.cache.max_bytes, or name another folder"
            ) from error
        self._bytes += len(block)
        return descriptor

    def _count_fetch(self) -> None:
        """Measure the folder now and then and whenever only this process filled it, and free space."""
        self._fetches += 1
        if self._fetches % FETCHES_PER_SCAN == 1 or self._bytes > self.settings.max_bytes:
            with self._locked("evict"):
                self._evict()

    def _evict(self) -> None:
        """Delete the blocks that were not used for longest, down to nine tenths of the limit."""
        blocks = []
        # Another process may evict or fetch meanwhile: sizes are what a listing finds, and a missing file is not an
        # error.
        for folder in self._folder.iterdir():
            for entry in os.scandir(folder) if folder.is_dir() else ():
                try:
                    facts = entry.stat()
                except FileNotFoundError:
                    continue
                blocks.append((facts.st_mtime_ns, facts.st_size, entry.path))
        self._bytes = sum(size for _, size, _ in blocks)
        if self._bytes <= self.settings.max_bytes:
            return
        for _, size, path in sorted(blocks):
            if self._bytes <= KEPT_AFTER_EVICTION * self.settings.max_bytes:
                return
            Path(path).unlink(missing_ok=True)  # who has it open keeps reading it
            self._bytes -= size

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        own_folder(self._folder)
        try:
            lock = take_lock(self._folder / f".lock-{name}", wait=True)
        except OSError as error:
            raise RuntimeError(
                f"data.cache.folder={self.settings.folder} cannot be used ({error.strerror}); name a writable folder"
            ) from error
        assert lock is not None, "waited for"
        with lock:
            yield


def own_folder(folder: Path, setting: str = "data.cache.folder") -> None:
    """Make a folder that no one else can write to, or require that of an existing one; `setting` is the key that chose it.

    What is in it is checked by digests that are next to it, which find damage, not malice: whoever can write here
    decides what a run reads. Raises RuntimeError for a folder of someone else, a link, or one that others may write to.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        facts = os.lstat(folder)
    except OSError as error:
        raise RuntimeError(f"{setting}: {folder} cannot be used ({error.strerror}); name a writable folder") from error
    if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.geteuid() or facts.st_mode & 0o022:
        raise RuntimeError(
            f"{setting}: {folder} must be a folder of this user that no one else can write to (chmod 700); what others put "
            f"there would be trained on: set {setting} to your own folder"
        )


def _digest(block: bytes) -> bytes:
    return blake3(block).digest(DIGEST_BYTES)


def _fetch(remote: RemoteFolder, name: str, size: int, number: int, block_bytes: int) -> bytes:
    """One ranged request for a block, checked against the size that the manifest names."""
    start, stop = number * block_bytes, min(size, (number + 1) * block_bytes)
    try:
        block, found = remote.read_range(name, start, stop)
    except FileNotFoundError as error:
        raise DamagedError(f"{remote.url}/{name} is missing; {_REMEDY}") from error
    except RuntimeError:
        found = remote.stat(name).num_bytes
        if found == size:
            raise
        block = b""
    if found != size or len(block) != stop - start:
        raise DamagedError(f"{remote.url}/{name} has {found} bytes, the manifest states {size}; {_REMEDY}")
    return block


_REMEDY = "copy the store to its place again"


class CachedFiles:
    """Shard files of a remote store, as a ShardedArray reads them: reads become whole blocks of the node cache.

    Sizes come from the manifest (`expect`) and not from the network, so opening a part asks for nothing.
    """

    def __init__(self, remote: RemoteFolder, settings: CacheSettings) -> None:
        self.remote, self.cache = remote, BlockCache(settings)
        self._block_bytes = settings.block_bytes
        self._expected: dict[str, tuple[int, str]] = {}
        self._handles: dict[int, tuple[str, int, str]] = {}
        self._next = 0

    def expect(self, path: str, size: int, content: str) -> None:
        """Report what the manifest knows about a file: its bytes and the digest of its part."""
        self._expected[path] = size, content

    def open(self, path: str) -> int:
        """Make a handle for a file that was named to `expect`; nothing is fetched yet."""
        self._next += 1
        size, content = self._expected[path]
        self._handles[self._next] = path.removeprefix(f"{self.remote.url}/"), size, content
        return self._next

    def size(self, handle: int) -> int:
        """Bytes as the manifest says; what is fetched is checked against it."""
        return self._handles[handle][1]

    def pread(self, handle: int, size: int, offset: int, /) -> bytes:
        """Bytes [offset, offset + size), fewer where the file ends; blocks that are not here are fetched."""
        name, whole, content = self._handles[handle]
        stop, pieces = min(offset + size, whole), []
        while offset < stop:
            number, inside = divmod(offset, self._block_bytes)
            count = min(stop - offset, self._block_bytes - inside)
            block = self.cache.open_block(self.remote, name, content, whole, number)
            pieces.append(os.pread(block, count, inside))
            offset += count
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def forget(self, paths: Iterable[str]) -> None:
        """Drop the blocks of files that turned out to be damaged."""
        for path in paths:
            size, content = self._expected[path]
            for number in range(-(-size // self._block_bytes)):
                self.cache.drop(self.remote, path.removeprefix(f"{self.remote.url}/"), content, number)

    def close(self, handle: int) -> None:
        """Give a handle back; its blocks stay."""
        del self._handles[handle]


def keep_small_files(
    remote: RemoteFolder, identity: str, names: Mapping[str, bytes | None], cache: CacheSettings
) -> Path:
    """Fill the folder of the node cache that stands for a store with these files and return it; content None: fetch it.

    DamagedError when a file is missing, RuntimeError when the cache's folder cannot be used.
    """
    key = hashlib.blake2b(f"{remote.url}\n{identity}".encode(), digest_size=16).hexdigest()
    folder = Path(cache.folder).expanduser() / "stores" / key
    try:
        own_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        for name, content in names.items():
            if not (folder / name).is_file():
                write_file_atomically(folder / name, remote.read(name) if content is None else content)
    except FileNotFoundError as error:
        raise DamagedError(f"{error}; copy the store to its place again") from error
    except OSError as error:
        raise RuntimeError(
            f"data.cache.folder={cache.folder} cannot be used ({error.strerror}); name a writable folder with room"
        ) from error
    return folder
