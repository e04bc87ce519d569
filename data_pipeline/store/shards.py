"""Read and encode the shard files of Zarr v3 arrays without threads: one pread, one crc32c, one decode a chunk.

The layout is the `sharding_indexed` codec of the Zarr v3 specification: encoded chunks, then an index of (offset,
size) pairs as little-endian uint64 and the crc32c of the index. zarr-python reads the same files.

A row of training is one or two small chunks out of a large file. Opening and the index are paid once a shard and kept; then a
read costs its bytes. Every chunk is checked each time it is read, because a disk or a copy can go bad after any check made
earlier, and training on damaged tokens shows nowhere.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Protocol

import google_crc32c
import numcodecs.blosc
import numcodecs.zstd
import numpy as np
import numpy.typing as npt
import zstandard

Compression = str  # "none", "lz4hc" or "zstd"

LZ4HC_LEVEL = 5
ZSTD_LEVEL = 3
EMPTY_CHUNK = np.uint64(2**64 - 1)

# Chunks are small and readers live in separate processes: blosc's thread pool would only survive forks badly.
numcodecs.blosc.use_threads = False


def encode_shard(values: npt.NDArray[np.generic], chunk: int, shard: int, compression: Compression) -> bytes:
    """Encode one shard: chunks of `chunk` values, the last padded with zeros, each followed by its crc32c.

    The index has shard / chunk entries whatever the number of values; those past the last chunk say "empty".
    """
    num_chunks = -(-len(values) // chunk)
    pieces, index, offset = [], np.full((shard // chunk, 2), EMPTY_CHUNK, dtype="<u8"), 0
    for number in range(num_chunks):
        piece = values[number * chunk : (number + 1) * chunk]
        if len(piece) < chunk:
            piece = np.concatenate((piece, np.zeros(chunk - len(piece), dtype=values.dtype)))
        payload = _compress(np.ascontiguousarray(piece), compression)
        pieces += [payload, google_crc32c.value(payload).to_bytes(4, "little")]
        index[number] = offset, len(payload) + 4
        offset += len(payload) + 4
    encoded_index = index.tobytes()
    return b"".join([*pieces, encoded_index, google_crc32c.value(encoded_index).to_bytes(4, "little")])


def _compress(values: npt.NDArray[np.generic], compression: Compression) -> bytes | npt.NDArray[np.uint8]:
    """Encode one chunk, little-endian, without its crc32c."""
    if compression == "none":
        return values.astype(values.dtype.newbyteorder("<"), copy=False).view(np.uint8)
    if compression == "lz4hc":
        return bytes(numcodecs.blosc.compress(values, b"lz4hc", LZ4HC_LEVEL, numcodecs.blosc.NOSHUFFLE, 0))
    assert compression == "zstd", f"unknown compression {compression}"
    return bytes(numcodecs.zstd.compress(values, ZSTD_LEVEL))


class DamagedError(RuntimeError):
    """A part is missing, truncated or altered; `data.on_corruption: quarantine` skips the samples that meet it."""


class ShardFiles(Protocol):
    """Where shard files are. A handle is what `open` gave; FileNotFoundError when there is no such file."""

    def open(self, path: str) -> int:
        """Open a file for reading at random."""

    def size(self, handle: int) -> int:
        """Bytes of an open file."""

    def pread(self, handle: int, size: int, offset: int, /) -> bytes:
        """Bytes [offset, offset + size), fewer where the file ends."""

    def close(self, handle: int) -> None:
        """Give a handle back."""


class LocalFiles:
    """Shard files on a disk, by pread: safe to share over fork, and a truncated file is an error and no signal."""

    pread = staticmethod(os.pread)
    close = staticmethod(os.close)

    def open(self, path: str) -> int:
        """Open a file descriptor without read-ahead, which would fetch 100 times what is used."""
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        return descriptor

    def size(self, handle: int) -> int:
        """Bytes of an open file."""
        return os.fstat(handle).st_size


_of_thread = threading.local()


def _zstd_decompressor() -> zstandard.ZstdDecompressor:
    """One per thread, kept because making it takes ten times as long as decoding a chunk."""
    if not hasattr(_of_thread, "zstd"):
        _of_thread.zstd = zstandard.ZstdDecompressor()
    return _of_thread.zstd


class ShardedArray:
    """A 1-D Zarr v3 array in a folder, read by ranges with every chunk verified.

    Opens shard files at the first read and keeps their index. Raises DamagedError for anything that is not as written.
    heads: the first value of every chunk, if they are known; a read that wants no more of its last chunk than that
    does not read it. Rows need one token more than their length, and it is often such a one.
    """

    def __init__(
        self,
        path: Path | str,
        dtype: str,
        length: int,
        *,
        chunk: int,
        shard: int,
        compression: Compression,
        files: ShardFiles | None = None,
    ) -> None:
        self.files = files or LocalFiles()
        self._pread = self.files.pread
        self.path, self.dtype, self.length = path, np.dtype(dtype), length
        self.chunk, self.shard, self.compression = chunk, shard, compression
        self._files: dict[int, tuple[int, memoryview]] = {}
        self.heads: npt.NDArray[np.generic] | None = None

    def read(self, start: int, stop: int) -> npt.NDArray[np.generic]:
        """Read values [start, stop); a fresh array, or a read-only view of fresh bytes."""
        assert 0 <= start <= stop <= self.length, (
            f"range {start}:{stop} outside the {self.length} values of {self.path}"
        )
        if self.heads is not None and stop - start > 1 and (stop - 1) % self.chunk == 0:
            out = np.empty(stop - start, self.dtype)
            out[:-1], out[-1] = self._read_chunks(start, stop - 1), self.heads[(stop - 1) // self.chunk]
            return out
        return self._read_chunks(start, stop)

    def _read_chunks(self, start: int, stop: int) -> npt.NDArray[np.generic]:
        """Read a range shard by shard; nearly all are in one shard, and are not copied."""
        shard = self.shard
        pieces = []
        while start < stop:
            number = start // shard
            end = min(stop, (number + 1) * shard)
            pieces.append(self._read_in_shard(number, start - number * shard, end - number * shard))
            start = end
        if len(pieces) == 1:
            return pieces[0]
        return np.concatenate(pieces) if pieces else np.empty(0, self.dtype)

    def read_all(self) -> npt.NDArray[np.generic]:
        """Read the whole array."""
        return self.read(0, self.length)

    def close(self) -> None:
        """Close the shard files; the next read opens them again."""
        for descriptor, _ in self._files.values():
            self.files.close(descriptor)
        self._files.clear()

    def _read_in_shard(self, shard: int, start: int, stop: int) -> npt.NDArray[np.generic]:
        """Read values [start, stop) of one shard with one pread: its chunks are one after another in the file."""
        descriptor, index = self._files.get(shard) or self._open(shard)
        chunk_length = self.chunk
        first, last = start // chunk_length, (stop - 1) // chunk_length
        # index[2 n] is the offset of chunk n, index[2 n + 1] its size.
        offset = index[2 * first]
        size = index[2 * last] + index[2 * last + 1] - offset
        data = self._pread(descriptor, size, offset)
        if len(data) != size:
            raise DamagedError(
                f"{self._file(shard)} is truncated: chunk {last} ends at byte {offset + size}, {_REMEDY}"
            )
        if first == last:
            return self._decode(data, 0, size, shard, first)[start - first * chunk_length : stop - first * chunk_length]
        out = np.empty(stop - start, self.dtype)
        for chunk in range(first, last + 1):
            values = self._decode(data, index[2 * chunk] - offset, index[2 * chunk + 1], shard, chunk)
            low = chunk * chunk_length
            place = max(0, low - start)
            values = values[max(0, start - low) : stop - low]
            out[place : place + len(values)] = values
        return out

    def _decode(self, data: bytes, begin: int, size: int, shard: int, chunk: int) -> npt.NDArray[np.generic]:
        """Decode the chunk that is encoded in data[begin : begin + size], its crc32c last, after checking that."""
        if self.compression == "none":
            if size != self.chunk * self.dtype.itemsize + 4:
                raise DamagedError(f"{self._file(shard)} is damaged: chunk {chunk} has {size} bytes, {_REMEDY}")
            payload = values = np.frombuffer(data, self.dtype, self.chunk, begin)
        else:
            payload = np.frombuffer(data, np.uint8, size - 4, begin)
        if google_crc32c.value(payload) != int.from_bytes(data[begin + size - 4 : begin + size], "little"):
            raise DamagedError(f"{self._file(shard)} is damaged: chunk {chunk} fails its crc32c, {_REMEDY}")
        if self.compression == "lz4hc":
            values = np.frombuffer(numcodecs.blosc.decompress(payload), dtype=self.dtype)
        elif self.compression == "zstd":
            values = np.frombuffer(_zstd_decompressor().decompress(payload.data), dtype=self.dtype)
        if len(values) != self.chunk:
            raise DamagedError(f"{self._file(shard)} is damaged: chunk {chunk} has {len(values)} values, {_REMEDY}")
        return values

    def _file(self, shard: int) -> str:
        return f"{self.path}/c/{shard}"

    def _open(self, shard: int) -> tuple[int, memoryview]:
        """Open a shard file and keep it with its verified index."""
        path = self._file(shard)
        try:
            descriptor = self.files.open(path)
        except FileNotFoundError as error:
            raise DamagedError(f"{path} is missing, {_REMEDY}") from error
        try:
            index = self._read_index(descriptor, path, shard)
        except DamagedError:
            self.files.close(descriptor)
            raise
        self._files[shard] = descriptor, index.reshape(-1).data  # a view gives Python integers, four times faster
        return self._files[shard]

    def _read_index(self, descriptor: int, path: str, shard: int) -> npt.NDArray[np.uint64]:
        """Read the index at the end of a shard file and check its crc32c: [chunks, 2] of offset and size, uint64."""
        # Chunks past the end of the array were never written, but zarr gives them places in the index.
        index_bytes = 16 * (self.shard // self.chunk)
        size = self.files.size(descriptor)
        data = self._pread(descriptor, index_bytes + 4, max(0, size - index_bytes - 4))
        if len(data) != index_bytes + 4:
            raise DamagedError(f"{path} is truncated: {size} bytes hold no index of {index_bytes} bytes, {_REMEDY}")
        if google_crc32c.value(data[:-4]) != int.from_bytes(data[-4:], "little"):
            raise DamagedError(f"{path} is damaged: its index fails its crc32c, {_REMEDY}")
        index = np.frombuffer(data[:-4], dtype="<u8").reshape(-1, 2).astype(np.uint64, copy=False)
        used = -(-min(self.shard, self.length - shard * self.shard) // self.chunk)
        if (index[:used, 0] == EMPTY_CHUNK).any():
            raise DamagedError(f"{path} is damaged: a chunk was never written, {_REMEDY}")
        return index


_REMEDY = "so the part cannot be used; delete the part's folder and run `amfm prepare CONFIG` to write it again"
