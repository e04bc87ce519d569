"""Flat files of token ids that other libraries wrote, read without tokenizing again.

Dolma (OLMo): ids alone in NAME.npy, which has no header of numpy's, and NAME.csv.gz with the first token and the end of each
document. datatrove: ids alone in NAME.ds, ends in NAME.ds.index (uint64). nanoGPT: ids alone in NAME.bin (uint16), where end
tokens are all that cuts documents; llm.c and modded-nanogpt put 256 int32 before them (magic, version, number of tokens).
All are little-endian.
"""

from __future__ import annotations

import csv
import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
import numpy.typing as npt

FLAT_KINDS = ("dolma", "datatrove", "nanogpt")
Open = Callable[[str], IO[bytes]]
HEADER_INTS = 256
MAGIC, VERSION = 20240520, 1
SPAN_TOKENS = 2**20
MOST_TOKENS = 2**26  # of a document of nanoGPT; more without an end token are of another tokenizer
MOST_INDEX_BYTES = 2**31


@dataclass(frozen=True)
class FlatTokens:
    """Where the documents of a flat file are; path: of the file, for `open` of the functions below.

    ends: past the last token of each document; None: end tokens cut them. start_byte: of the first token.
    """

    path: str
    dtype: str
    start_byte: int
    num_tokens: int
    ends: npt.NDArray[np.int64] | None

    def cut(self, num_bytes: int) -> Iterator[tuple[int, int, int]]:
        """First and stop of runs of documents (of tokens, without ends) of about `num_bytes`, and the bytes of each."""
        size = np.dtype(self.dtype).itemsize
        if self.ends is None:
            each = max(1, num_bytes // size)
            for start in range(0, self.num_tokens, each):
                stop = min(start + each, self.num_tokens)
                yield start, stop, (stop - start) * size
            return
        first, bounds = 0, np.concatenate((np.zeros(1, np.int64), self.ends)) * size
        while first < len(self.ends):
            reach = int(np.searchsorted(bounds, bounds[first] + num_bytes, side="right")) - 1
            stop = max(first + 1, reach)
            yield first, stop, int(bounds[stop] - bounds[first])
            first = stop


def read_flat_tokens(kind: str, path: str, num_bytes: int, open_file: Open) -> FlatTokens:
    """Find the documents of a file of one of FLAT_KINDS and so many bytes. Raises ValueError if it is damaged or its index is missing."""
    if kind == "nanogpt":
        return _nanogpt(path, num_bytes, open_file)
    index = f"{path.removesuffix('.npy')}.csv.gz" if kind == "dolma" else f"{path}.index"
    try:
        with open_file(index) as file:
            ends = _dolma_ends(file, index) if kind == "dolma" else _datatrove_ends(file, index)
    except FileNotFoundError as error:
        raise ValueError(
            f"{path} needs {index.rpartition('/')[2]} next to it, which says where documents end"
        ) from error
    total = int(ends[-1]) if len(ends) else 0
    if not total or (np.diff(ends, prepend=0) < 0).any() or num_bytes % total or num_bytes // total not in (2, 4):
        raise ValueError(
            f"{path} has {num_bytes} bytes and its index {total} tokens, which is neither 2 nor 4 bytes per token in order; restore "
            "both from a copy"
        )
    return FlatTokens(path, f"<u{num_bytes // total}", 0, total, ends)


def _dolma_ends(file: IO[bytes], index: str) -> npt.NDArray[np.int64]:
    starts, ends = [], []
    try:
        with gzip.open(file) as stream:
            for row in csv.reader(io.TextIOWrapper(stream, encoding="utf-8", errors="replace", newline="")):
                starts.append(int(row[0]))
                ends.append(int(row[1]))
    except (ValueError, IndexError, EOFError, zlib.error, gzip.BadGzipFile, csv.Error) as error:
        raise ValueError(f"{index} is damaged: {error}; restore it from a copy") from error
    if starts != [0, *ends[:-1]][: len(starts)]:
        raise ValueError(f"{index} is damaged: documents must begin where the one before ends; restore it from a copy")
    return np.array(ends, np.int64)


def _datatrove_ends(file: IO[bytes], index: str) -> npt.NDArray[np.int64]:
    content = file.read(MOST_INDEX_BYTES + 1)
    if len(content) % 8 or len(content) > MOST_INDEX_BYTES:
        raise ValueError(f"{index} is damaged: {len(content)} bytes are not numbers of 8; restore it from a copy")
    return np.frombuffer(content, "<u8").astype(np.int64)


def _nanogpt(path: str, num_bytes: int, open_file: Open) -> FlatTokens:
    with open_file(path) as file:
        header = np.frombuffer(file.read(4 * HEADER_INTS), "<i4", count=min(3, num_bytes // 4))
    if len(header) < 3 or header[0] != MAGIC:
        if num_bytes % 2:
            raise ValueError(f"{path} has {num_bytes} bytes, an odd number; token ids of nanoGPT have 2 bytes each")
        return FlatTokens(path, "<u2", 0, num_bytes // 2, None)
    start, tokens = 4 * HEADER_INTS, int(header[2])
    if header[1] != VERSION or start + 2 * tokens != num_bytes:
        raise ValueError(
            f"{path} says version {header[1]} and {tokens} tokens in {num_bytes} bytes; version {VERSION} of as many tokens of 2 "
            "bytes as it says is read"
        )
    return FlatTokens(path, "<u2", start, tokens, None)


def read_flat_documents(
    flat: FlatTokens, first: int, stop: int, end_id: int, open_file: Open
) -> Iterator[tuple[int, npt.NDArray[np.int64]]]:
    """Read the documents of a run of `cut`: the first token of each, and its ids, int64. ValueError for a file that shrank."""
    size = np.dtype(flat.dtype).itemsize
    with open_file(flat.path) as file:
        if flat.ends is None:
            yield from _between_ends(flat, first, stop, end_id, file)
            return
        bounds = np.concatenate((np.zeros(1, np.int64), flat.ends))[first : stop + 1]
        file.seek(flat.start_byte + int(bounds[0]) * size)
        for start, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
            yield start, _take(flat, file, end - start)


def _between_ends(
    flat: FlatTokens, start: int, stop: int, end_id: int, file: IO[bytes]
) -> Iterator[tuple[int, npt.NDArray[np.int64]]]:
    """Documents whose first token is in [start, stop), each with its end token."""
    file.seek(flat.start_byte + 2 * max(0, start - 1))
    skips = start > 0 and int(_take(flat, file, 1)[0]) != end_id
    begin, position, pieces = start, start, list[npt.NDArray[Any]]()
    while position < flat.num_tokens and begin < stop:
        block = _take(flat, file, min(SPAN_TOKENS, flat.num_tokens - position))
        last = 0
        for end in (np.flatnonzero(block == end_id) + 1).tolist():
            if begin >= stop:
                return
            if not skips:
                yield begin, np.concatenate([*pieces, block[last:end]])
            skips, pieces, last, begin = False, [], end, position + end
        position += len(block)
        if not skips:
            pieces.append(block[last:])
        if position - begin > MOST_TOKENS:
            raise ValueError(
                f"{flat.path} has no end token {end_id} in {MOST_TOKENS:,} tokens; give the tokenizer of these tokens"
            )
    rest = np.concatenate(pieces) if pieces else np.zeros(0, np.int64)
    if len(rest) and begin < stop:
        yield begin, rest


def _take(flat: FlatTokens, file: IO[bytes], count: int) -> npt.NDArray[np.int64]:
    size = np.dtype(flat.dtype).itemsize
    content = file.read(count * size)
    if len(content) < count * size:
        raise ValueError(f"{flat.path} became shorter while it was read; restore it from a copy")
    return np.frombuffer(content, flat.dtype).astype(np.int64)
