"""Read and encode the shard files of Zarr v3 arrays without threads: one pread, one crc32c, one decode a chunk.

The layout is the `sharding_indexed` codec of the Zarr v3 specification: encoded chunks, then an index of (offset,
size) pairs as little-endian uint64 and the crc32c of the index. zarr-python reads the same files.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import google_crc32c
import numcodecs.blosc
import numcodecs.zstd
import numpy as np
import numpy.typing as npt

Compression = str  # "none", "lz4hc" or "zstd"

LZ4HC_LEVEL = 5
ZSTD_LEVEL = 3
EMPTY_CHUNK = np.uint64(2**64 - 1)

# Chunks are small and readers live in processes of their own: blosc's thread pool would only survive forks badly.
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


def _compress(values: npt.NDArray[np.generic], compression: Compression) -> bytes:
    if compression == "none":
        return values.astype(values.dtype.newbyteorder("<"), copy=False).tobytes()
    if compression == "lz4hc":
        return bytes(numcodecs.blosc.compress(values, b"lz4hc", LZ4HC_LEVEL, numcodecs.blosc.NOSHUFFLE, 0))
    assert compression == "zstd", f"unknown compression {compression}"
    return bytes(numcodecs.zstd.compress(values, ZSTD_LEVEL))


class DamagedError(RuntimeError):
    """A part is missing, cut short or altered; quarantine catches it."""


class ShardedArray:
    """A 1-D Zarr v3 array on a local disk, read by ranges with every chunk verified.

    Opens shard files at the first read, keeps their index, and uses pread only: safe to share over fork, and a
    truncated file is an error instead of a signal. Raises DamagedError for anything that isn't as written.
    """

    def __init__(
        self, path: Path, dtype: str, length: int, *, chunk: int, shard: int, compression: Compression
    ) -> None:
        self.path, self.dtype, self.length = path, np.dtype(dtype), length
        self.chunk, self.shard, self.compression = chunk, shard, compression
        self._files: dict[int, tuple[int, npt.NDArray[np.uint64]]] = {}

    def read(self, start: int, stop: int) -> npt.NDArray[np.generic]:
        """Values [start, stop); a fresh array, or a read-only view of fresh bytes."""
        assert 0 <= start <= stop <= self.length, (
            f"range {start}:{stop} outside the {self.length} values of {self.path}"
        )
        pieces = []
        while start < stop:
            shard = start // self.shard
            end = min(stop, (shard + 1) * self.shard)
            pieces += self._read_in_shard(shard, start - shard * self.shard, end - shard * self.shard)
            start = end
        if len(pieces) == 1:
            return pieces[0]
        return np.concatenate(pieces) if pieces else np.empty(0, self.dtype)

    def read_all(self) -> npt.NDArray[np.generic]:
        """The whole array."""
        return self.read(0, self.length)

    def close(self) -> None:
        """Close the shard files; the next read opens them again."""
        for descriptor, _ in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def _read_in_shard(self, shard: int, start: int, stop: int) -> list[npt.NDArray[np.generic]]:
        descriptor, index = self._files.get(shard) or self._open(shard)
        first, last = start // self.chunk, (stop - 1) // self.chunk
        offset = int(index[first, 0])
        size = int(index[last, 0] + index[last, 1]) - offset
        data = os.pread(descriptor, size, offset)
        if len(data) != size:
            raise DamagedError(
                f"{self._file(shard)} is cut short: chunk {last} ends at byte {offset + size}, {_REMEDY}"
            )
        pieces = []
        for chunk in range(first, last + 1):
            begin = int(index[chunk, 0]) - offset
            values = self._decode(memoryview(data)[begin : begin + int(index[chunk, 1])], shard, chunk)
            pieces.append(values[max(0, start - chunk * self.chunk) : stop - chunk * self.chunk])
        return pieces

    def _decode(self, encoded: memoryview, shard: int, chunk: int) -> npt.NDArray[np.generic]:
        payload = np.frombuffer(encoded[:-4], dtype=np.uint8)
        if google_crc32c.value(payload) != int.from_bytes(encoded[-4:], "little"):
            raise DamagedError(f"{self._file(shard)} is damaged: chunk {chunk} fails its crc32c, {_REMEDY}")
        if self.compression == "none":
            values = payload.view(self.dtype)
        elif self.compression == "lz4hc":
            values = np.frombuffer(numcodecs.blosc.decompress(payload), dtype=self.dtype)
        else:
            values = np.frombuffer(numcodecs.zstd.decompress(payload), dtype=self.dtype)
        if len(values) != self.chunk:
            raise DamagedError(f"{self._file(shard)} is damaged: chunk {chunk} has {len(values)} values, {_REMEDY}")
        return values

    def _file(self, shard: int) -> Path:
        return self.path / "c" / str(shard)

    def _open(self, shard: int) -> tuple[int, npt.NDArray[np.uint64]]:
        path = self._file(shard)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise DamagedError(f"{path} is missing, {_REMEDY}") from error
        try:
            index = self._read_index(descriptor, path)
        except DamagedError:
            os.close(descriptor)
            raise
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)  # read-ahead would fetch 100 times what is used
        self._files[shard] = descriptor, index
        return descriptor, index

    def _read_index(self, descriptor: int, path: Path) -> npt.NDArray[np.uint64]:
        # Chunks past the end of the array were never written, but zarr gives them places in the index.
        index_bytes = 16 * (self.shard // self.chunk)
        size = os.fstat(descriptor).st_size
        data = os.pread(descriptor, index_bytes + 4, max(0, size - index_bytes - 4))
        if len(data) != index_bytes + 4:
            raise DamagedError(f"{path} is cut short: {size} bytes hold no index of {index_bytes} bytes, {_REMEDY}")
        if google_crc32c.value(data[:-4]) != int.from_bytes(data[-4:], "little"):
            raise DamagedError(f"{path} is damaged: its index fails its crc32c, {_REMEDY}")
        index = np.frombuffer(data[:-4], dtype="<u8").reshape(-1, 2).astype(np.uint64)
        shard_number = int(path.name)
        used = -(-min(self.shard, self.length - shard_number * self.shard) // self.chunk)
        if (index[:used, 0] == EMPTY_CHUNK).any():
            raise DamagedError(f"{path} is damaged: a chunk was never written, {_REMEDY}")
        return index


_REMEDY = "so the part can't be used; delete the part's folder and run `amfm prepare CONFIG` to write it again"


def iterate_shards(values: npt.NDArray[np.generic], shard: int) -> Iterator[tuple[int, npt.NDArray[np.generic]]]:
    """Cut an array into (number, values) of its shards; an empty array has none."""
    for number in range(-(-len(values) // shard)):
        yield number, values[number * shard : (number + 1) * shard]
