"""Megatron's .bin/.idx token files: read without tokenizing again, and written from a store.

Format: megatron/core/datasets/indexed_dataset.py of Megatron-LM (magic MMIDIDX, version 1). The .bin is token ids alone. The
.idx has a header (magic, version, dtype code, numbers of sequences and of document bounds), then the lengths of sequences
(int32), their byte offsets in the .bin (int64) and the number of the first sequence of each document, with the end (int64);
all little-endian.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from amfm.data_pipeline.progress import Report, silent
from amfm.data_pipeline.store.manifest import Split
from amfm.data_pipeline.store.store import TokenStore

MAGIC = b"MMIDIDX\x00\x00"
DTYPE_BY_CODE = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}
CODE_BY_DTYPE = {name: code for code, name in DTYPE_BY_CODE.items()}
HEADER = struct.Struct("<9sQBQQ")
SPAN_TOKENS = 2**20


@dataclass(frozen=True)
class MegatronIndex:
    """What an .idx says. offsets: first byte of each document in the .bin, and the end; [documents + 1]."""

    dtype: str
    offsets: npt.NDArray[np.int64]

    @property
    def num_documents(self) -> int:
        """Documents in the file."""
        return len(self.offsets) - 1


def read_megatron_index(path: Path) -> MegatronIndex:
    """Read an .idx file; ValueError when it isn't one or doesn't fit the .bin next to it."""
    content = path.read_bytes()
    if len(content) < HEADER.size or content[: len(MAGIC)] != MAGIC:
        raise ValueError(
            f"{path} isn't a Megatron index (no {MAGIC[:7].decode()} at its start); name the .idx of a dataset"
        )
    _, version, code, num_sequences, num_bounds = HEADER.unpack_from(content)
    if version != 1 or code not in DTYPE_BY_CODE:
        raise ValueError(f"{path} has version {version} and dtype code {code}; version 1 with integer tokens is read")
    expected = HEADER.size + num_sequences * 12 + num_bounds * 8
    if len(content) < expected:
        raise ValueError(f"{path} is cut short: {len(content)} bytes of {expected}; restore it from a copy")
    lengths = np.frombuffer(content, "<i4", num_sequences, HEADER.size).astype(np.int64)
    pointers = np.frombuffer(content, "<i8", num_sequences, HEADER.size + 4 * num_sequences)
    bounds = np.frombuffer(content, "<i8", num_bounds, HEADER.size + 12 * num_sequences)
    dtype = DTYPE_BY_CODE[code]
    sequence_ends = np.cumsum(lengths) * np.dtype(dtype).itemsize
    if not np.array_equal(pointers[1:], sequence_ends[:-1]) or (num_sequences and pointers[0] != 0):
        raise ValueError(f"{path} has gaps between its sequences; write the dataset again with Megatron's builder")
    if (np.diff(bounds, prepend=0, append=num_sequences) < 0).any():
        raise ValueError(
            f"{path} is damaged: its documents must begin one behind the other among its {num_sequences} sequences; restore "
            "it from a copy"
        )
    size = path.with_suffix(".bin").stat().st_size
    used = int(sequence_ends[-1]) if num_sequences else 0
    if size != used:
        raise ValueError(
            f"{path.with_suffix('.bin')} has {size} bytes, its index says {used}; restore both from a copy"
        )
    return MegatronIndex(dtype, np.concatenate((np.zeros(1, np.int64), sequence_ends))[bounds])


def read_megatron_documents(path: Path, first: int, stop: int) -> Iterator[npt.NDArray[np.int64]]:
    """Read the token ids of documents [first, stop) of the dataset whose .idx is at path, int64, one array a document."""
    index = read_megatron_index(path)
    with path.with_suffix(".bin").open("rb") as file:
        file.seek(int(index.offsets[first]))
        for size in np.diff(index.offsets[first : stop + 1]).tolist():
            yield np.frombuffer(file.read(size), dtype=index.dtype).astype(np.int64)


def export_megatron(store: TokenStore, source: str, split: Split, prefix: str | Path, report: Report = silent) -> int:
    """Write a source as PREFIX.bin and PREFIX.idx, a document a sequence with its end token; returns the documents.

    uint16 stays uint16; uint32 becomes int32, Megatron's other token type. The .idx appears last, under its final
    name. ValueError when an id doesn't fit int32.
    """
    bin_path, index_path = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
    dtype = "uint16" if store.layout.dtype == "uint16" else "int32"
    if store.vocab_size > np.iinfo(dtype).max + 1:
        raise ValueError(
            f"vocabulary {store.vocab_size} must fit Megatron's {dtype}: at most {np.iinfo(dtype).max + 1}"
        )
    bin_path.parent.mkdir(parents=True, exist_ok=True)
    lengths: list[npt.NDArray[np.int64]] = []
    done, total = 0, store.num_tokens(source, split) * np.dtype(dtype).itemsize
    with bin_path.open("wb") as file:
        for part in store.parts(source, split):
            ends = store.document_ends(part)
            lengths.append(ends - np.concatenate((np.zeros(1, np.int64), ends[:-1])))
            for start in range(0, part.num_tokens, SPAN_TOKENS):
                tokens = store.read_tokens(part, start, min(part.num_tokens, start + SPAN_TOKENS))
                done += file.write(tokens.astype(dtype).tobytes())
                report(f"writing {bin_path.name}", done, total)
    flat = np.concatenate(lengths) if lengths else np.zeros(0, np.int64)
    pointers = (np.cumsum(flat) - flat) * np.dtype(dtype).itemsize
    temporary = index_path.with_name(f".writing-{index_path.name}")
    with temporary.open("wb") as file:
        file.write(HEADER.pack(MAGIC, 1, CODE_BY_DTYPE[dtype], len(flat), len(flat) + 1))
        file.write(flat.astype("<i4").tobytes() + pointers.astype("<i8").tobytes())
        file.write(np.arange(len(flat) + 1, dtype="<i8").tobytes())
    os.replace(temporary, index_path)
    return len(flat)
