"""Megatron's .bin/.idx token files: read without tokenizing again, and written from a store.

Format: megatron/core/datasets/indexed_dataset.py of Megatron-LM (magic MMIDIDX, version 1). The .bin is only token ids. The
.idx has a header (magic, version, dtype code, numbers of sequences and of document bounds), then the lengths of sequences
(int32), their byte offsets in the .bin (int64) and the number of the first sequence of each document, with the end (int64);
all little-endian.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from amfm.data_pipeline.durable.files import replacing
from amfm.data_pipeline.store.manifest import Split
from amfm.data_pipeline.store.store import TokenStore
from amfm.data_pipeline.store.token_files import Open
from amfm.data_pipeline.terminal import Report, silent

MAGIC = b"MMIDIDX\x00\x00"
DTYPE_BY_CODE = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}
CODE_BY_DTYPE = {name: code for code, name in DTYPE_BY_CODE.items()}
HEADER = struct.Struct("<9sQBQQ")
SPAN_TOKENS = 2**20


@dataclass(frozen=True)
class MegatronIndex:
    """What the head of an .idx says; the rest is read in pieces, because it can have gigabytes.

    num_bytes: of the .bin next to it.
    """

    path: str
    dtype: str
    num_sequences: int
    num_documents: int
    num_bytes: int
    open_file: Open = field(compare=False)

    def offsets(self, first: int, stop: int) -> npt.NDArray[np.int64]:
        """First byte in the .bin of each document in [first, stop), and the end; [stop - first + 1]. ValueError if damaged."""
        sequences = self._bounds(first, stop + 1)
        before, after = int(sequences[0]), int(sequences[-1])
        if (np.diff(sequences, prepend=0, append=self.num_sequences) < 0).any():
            raise self._disordered()
        begins = self._pointers(before, min(after + 1, self.num_sequences))
        offsets = np.append(begins, self.num_bytes)[sequences - before]
        if (np.diff(offsets, prepend=0, append=self.num_bytes) < 0).any():
            raise self._disordered()
        return offsets

    def cut(self, num_bytes: int, first: int = 0, end: int | None = None) -> Iterator[tuple[int, int, int]]:
        """First and stop of runs of documents of about `num_bytes`, one document at least, and the bytes of each.

        Of the documents in [first, end); end None: of all behind `first`.
        """
        width, end = 2**12, self.num_documents if end is None else end
        while first < end:
            stop = min(first + width, end)
            offsets = self.offsets(first, stop)
            reach = max(1, int(np.searchsorted(offsets, offsets[0] + num_bytes, side="right")) - 1)
            if first + reach == stop < end:
                width *= 2
                continue
            yield first, first + reach, int(offsets[reach] - offsets[0])
            first += reach

    def split(self, shares: str) -> tuple[int, int]:
        """The document at which Megatron's `--split` begins to validate, and that at which it begins to test.

        Raises ValueError if documents are of several sequences, which it would cut apart.
        """
        if self.num_sequences != self.num_documents:
            raise ValueError(
                f"{self.path} has {self.num_sequences} sequences in {self.num_documents} documents, and Megatron's split cuts "
                "sequences; remove data.megatron_split, or write the dataset with a sequence per document"
            )
        numbers = [float(number) for number in shares.split(",")]
        if not sum(numbers):
            raise ValueError(f"data.megatron_split={shares} leaves no documents; give at least one share above 0")
        train = numbers[0] / sum(numbers)
        valid = train + (numbers[1] / sum(numbers) if len(numbers) > 1 else 0.0)
        return round(train * self.num_documents), round(valid * self.num_documents)

    def check(self) -> None:
        """Read all of it, a piece at a time. Raises ValueError if it is damaged or does not fit the .bin."""
        end, itemsize = 0, np.dtype(self.dtype).itemsize
        for start in range(0, self.num_sequences, SPAN_TOKENS):
            stop = min(start + SPAN_TOKENS, self.num_sequences)
            lengths = self._read("<i4", 0, start, stop).astype(np.int64) * itemsize
            ends = end + np.cumsum(lengths)
            if (lengths < 0).any():
                raise ValueError(f"{self.path} is damaged: a sequence has a negative length; restore it from a copy")
            if not np.array_equal(self._pointers(start, stop), ends - lengths):
                raise ValueError(
                    f"{self.path} has gaps between its sequences; write the dataset again with Megatron's builder"
                )
            end = int(ends[-1])
        if end != self.num_bytes:
            raise ValueError(
                f"{bin_of(self.path)} has {self.num_bytes} bytes, its index states {end}; restore both from a copy"
            )
        if [*self._bounds(0, 1), *self._bounds(self.num_documents, self.num_documents + 1)] != [0, self.num_sequences]:
            raise self._disordered()
        for start in range(0, self.num_documents, SPAN_TOKENS):
            self.offsets(start, min(start + SPAN_TOKENS, self.num_documents))

    def _pointers(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        return self._read("<i8", 4 * self.num_sequences, start, stop)

    def _bounds(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        return self._read("<i8", 12 * self.num_sequences, start, stop)

    def _read(self, dtype: str, column: int, start: int, stop: int) -> npt.NDArray[Any]:
        size = np.dtype(dtype).itemsize
        with self.open_file(self.path) as file:
            file.seek(HEADER.size + column + start * size)
            content = file.read((stop - start) * size)
        if len(content) < (stop - start) * size:
            raise ValueError(f"{self.path} became shorter while it was read; restore it from a copy")
        return np.frombuffer(content, dtype)

    def _disordered(self) -> ValueError:
        return ValueError(
            f"{self.path} is damaged: its documents must begin one after the other and hold all of its {self.num_sequences} "
            "sequences; restore it from a copy"
        )


def bin_of(index: str) -> str:
    """The file with the tokens of an index."""
    return f"{index.removesuffix('.idx')}.bin"


def _open_local(path: str) -> IO[bytes]:
    return open(path, "rb")


def read_megatron_index(path: str | Path, open_file: Open = _open_local, num_bytes: int | None = None) -> MegatronIndex:
    """Read the head of an .idx file; ValueError when it is not one. `check` reads the rest.

    num_bytes: of the .bin; None: a local file is asked.
    """
    path = str(path)
    with open_file(path) as file:
        header, size = file.read(HEADER.size), file.seek(0, os.SEEK_END)
    if len(header) < HEADER.size or header[: len(MAGIC)] != MAGIC:
        raise ValueError(
            f"{path} is not a Megatron index (no {MAGIC[:7].decode()} at its start); name the .idx of a dataset"
        )
    _, version, code, num_sequences, num_bounds = HEADER.unpack(header)
    if version != 1 or code not in DTYPE_BY_CODE:
        raise ValueError(f"{path} has version {version} and dtype code {code}; version 1 with integer tokens is read")
    if num_bounds < 1:
        raise ValueError(f"{path} is damaged: it has no end of its documents; restore it from a copy")
    expected = HEADER.size + num_sequences * 12 + num_bounds * 8
    if size < expected:
        raise ValueError(f"{path} is truncated: {size} bytes of {expected}; restore it from a copy")
    num_bytes = os.stat(bin_of(path)).st_size if num_bytes is None else num_bytes
    return MegatronIndex(path, DTYPE_BY_CODE[code], num_sequences, num_bounds - 1, num_bytes, open_file)


def read_megatron_documents(index: MegatronIndex, first: int, stop: int) -> Iterator[npt.NDArray[np.int64]]:
    """Read the token ids of documents [first, stop) of an index, int64, one array a document."""
    offsets = index.offsets(first, stop)
    with index.open_file(bin_of(index.path)) as file:
        file.seek(int(offsets[0]))
        for size in np.diff(offsets).tolist():
            yield np.frombuffer(file.read(size), dtype=index.dtype).astype(np.int64)


def export_megatron(store: TokenStore, source: str, split: Split, prefix: str | Path, report: Report = silent) -> int:
    """Write a source as PREFIX.bin and PREFIX.idx, a document a sequence with its end token; returns the documents.

    uint16 stays uint16; uint32 becomes int32, Megatron's other token type. Both are written under random names, synced and
    renamed, the .idx last. ValueError when an id does not fit int32, and for a source of which only parts are learned.
    """
    if any(part.num_spans for part in store.parts(source, split)):
        raise ValueError(
            f"source {source!r} states which of its tokens are learned, and a .bin cannot; leave it out, or train on the store"
        )
    bin_path, index_path = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
    dtype = "uint16" if store.layout.dtype == "uint16" else "int32"
    if store.vocab_size > np.iinfo(dtype).max + 1:
        raise ValueError(
            f"vocabulary {store.vocab_size} must fit Megatron's {dtype}: at most {np.iinfo(dtype).max + 1}"
        )
    bin_path.parent.mkdir(parents=True, exist_ok=True)
    lengths: list[npt.NDArray[np.int64]] = []
    done, total = 0, store.num_tokens(source, split) * np.dtype(dtype).itemsize
    with replacing(bin_path) as file:
        for part in store.parts(source, split):
            ends = store.document_ends(part)
            lengths.append(ends - np.concatenate((np.zeros(1, np.int64), ends[:-1])))
            for start in range(0, part.num_tokens, SPAN_TOKENS):
                tokens = store.read_tokens(part, start, min(part.num_tokens, start + SPAN_TOKENS))
                done += file.write(tokens.astype(dtype).tobytes())
                report(f"writing {bin_path.name}", done, total)
        index_path.unlink(missing_ok=True)  # of other tokens
    flat = np.concatenate(lengths) if lengths else np.zeros(0, np.int64)
    pointers = (np.cumsum(flat) - flat) * np.dtype(dtype).itemsize
    with replacing(index_path) as file:
        file.write(HEADER.pack(MAGIC, 1, CODE_BY_DTYPE[dtype], len(flat), len(flat) + 1))
        file.write(flat.astype("<i4").tobytes() + pointers.astype("<i8").tobytes())
        file.write(np.arange(len(flat) + 1, dtype="<i8").tobytes())
    return len(flat)
