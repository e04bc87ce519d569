"""Flat files of token ids that other libraries wrote, read without tokenizing again.

Dolma (OLMo): only ids in NAME.npy, which has no header of numpy's, and NAME.csv.gz with the first token and the end of each
document. datatrove: only ids in NAME.ds, ends in NAME.ds.index (uint64). nanoGPT: only ids in NAME.bin (uint16), where end
tokens are all that cuts documents; llm.c and modded-nanogpt put 256 int32 before them (magic, version, number of tokens).
litdata (`TokensLoader`, 0.2.76): chunk-R-N.bin has the number of items, the byte where each begins, with the end (uint32), then only ids,
whose type is in index.json. All are little-endian.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from amfm.data_pipeline.durable.json_files import MAX_JSON_BYTES

FLAT_KINDS = ("dolma", "datatrove", "nanogpt", "litdata")
Open = Callable[[str], IO[bytes]]
HEADER_INTS = 256
MAGIC, VERSION = 20240520, 1
SPAN_TOKENS = 2**20
MOST_TOKENS = 2**26  # of a document of nanoGPT; more without an end token are of another tokenizer
MOST_INDEX_BYTES = 2**31
# What litdata's numbers for types of torch and of numpy mean, of integers.
LITDATA_TYPES = {
    "no_header_tensor": {
        11: "u1",
        12: "i1",
        13: "<i2",
        14: "<i2",
        15: "<i4",
        16: "<i4",
        17: "<i8",
        18: "<i8",
        20: "<u2",
    },
    "no_header_numpy": {0: "i1", 1: "<i2", 2: "<i4", 3: "<i8", 4: "u1", 5: "<u2", 6: "<u4", 7: "<u8"},
}


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
    if kind == "litdata":
        return _litdata(path, num_bytes, open_file)
    index = f"{path.removesuffix('.npy')}.csv.gz" if kind == "dolma" else f"{path}.index"
    try:
        with open_file(index) as file:
            ends = _dolma_ends(file, index) if kind == "dolma" else _datatrove_ends(file, index)
    except FileNotFoundError as error:
        raise ValueError(
            f"{path} needs {index.rpartition('/')[2]} next to it, which states where documents end"
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
    size = file.seek(0, os.SEEK_END)
    if size % 8 or size > MOST_INDEX_BYTES:
        raise ValueError(f"{index} is damaged: {size} bytes are not numbers of 8; restore it from a copy")
    file.seek(0)
    content = file.read(size)
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
            f"{path} states version {header[1]} and {tokens} tokens in {num_bytes} bytes; version {VERSION} of as many tokens of 2 "
            "bytes as it states is read"
        )
    return FlatTokens(path, "<u2", start, tokens, None)


def _litdata(path: str, num_bytes: int, open_file: Open) -> FlatTokens:
    index = f"{path.rpartition('/')[0]}/index.json"
    try:
        with open_file(index) as file:
            config = json.loads(file.read(MAX_JSON_BYTES))["config"]
    except FileNotFoundError as error:
        raise ValueError(f"{path} needs index.json next to it, which states what its tokens are") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{index} is damaged: {error}; restore it from a copy") from error
    said = config.get("data_format") if isinstance(config, dict) else None
    kind, _, code = str(said[0]).partition(":") if isinstance(said, list) and len(said) == 1 else ("", "", "")
    dtype = LITDATA_TYPES.get(kind, {}).get(int(code) if code.isdecimal() else -1)
    if isinstance(config, dict) and config.get("encryption") is not None:
        raise ValueError(f"{index} states that its chunks are encrypted; write them without, by litdata")
    if dtype is None or config.get("compression") is not None:
        raise ValueError(
            f"{index} states data_format {said} and compression {config.get('compression') if isinstance(config, dict) else None}; one "
            "array of integers an item (TokensLoader), without compression, is read"
        )
    with open_file(path) as file:
        number = int.from_bytes(file.read(4), "little")
        header, size = 4 * (number + 2), np.dtype(dtype).itemsize
        content = file.read(header - 4) if header <= num_bytes else b""
    bounds = np.frombuffer(content[: len(content) // 4 * 4], "<u4").astype(np.int64)
    if len(bounds) != number + 1 or bounds[0] != header or bounds[-1] != num_bytes or (np.diff(bounds) < 0).any():
        raise ValueError(
            f"{path} is damaged: its {number} items must follow one another, up to its end; restore it from a copy"
        )
    if ((bounds - header) % size).any():
        raise ValueError(
            f"{path} is damaged: its items are not of {size} bytes per token, as in {index}; restore both from a copy"
        )
    ends = (bounds[1:] - header) // size
    return FlatTokens(path, dtype, header, int(ends[-1]) if number else 0, ends)


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
