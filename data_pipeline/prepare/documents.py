"""Readers: files, byte ranges and row groups become documents, and what cannot be used becomes a reject with a reason.

A source of terabytes has damaged lines, so a bad record never stops a preparation: it is a reject with its position, and the
rest continues. What is not the record's fault stops it: errors of the disk carry an errno and are raised, while those
of a broken compressed stream do not. Plain jsonl is read in byte ranges that begin anywhere; a line belongs to the
range that holds its first byte, so ranges need no knowledge of each other and cover every line once.
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import IO, Any, cast

import numpy as np
import numpy.typing as npt
import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pydantic_core

from amfm.data_pipeline.prepare.columns import (
    check_offsets,
    column_problem,
    holds_ids,
    is_of_the_disk,
)
from amfm.data_pipeline.prepare.dialogues import Dialogues
from amfm.data_pipeline.prepare.filters import Filter
from amfm.data_pipeline.prepare.segments import Segment
from amfm.data_pipeline.prepare.sources import BUFFER_BYTES, TOKEN_KINDS, InputFile
from amfm.data_pipeline.store.mds_files import DamagedShardError, MdsShard, read_mds_shard
from amfm.data_pipeline.store.megatron_files import read_megatron_documents, read_megatron_index
from amfm.data_pipeline.store.token_files import read_flat_documents, read_flat_tokens
from amfm.data_pipeline.tokenizer.chat_template import Span

MAX_DOCUMENT_BYTES = 2**28  # of a text, decompressed; a small file can hold one that takes a node's memory
MAX_UNPACKED_BYTES = 2**31  # of a compressed parquet or arrow file, which is held in memory
TOO_LONG = f"longer than {MAX_DOCUMENT_BYTES >> 20} MiB, the most that a document may have"
NAME_TOKENIZER = ", which mean nothing to a tokenizer trained here; name the file of the tokenizer that made them in data.tokenizer.model"
NO_FILTERS = "filters need text; remove them"
BATCH_ROWS = 1024  # of parquet that memory holds at once: a small file may unpack to 10^9 equal cells


@dataclass(frozen=True, slots=True)
class Document:
    """One text, its size in UTF-8 and where it came from: a byte of plain jsonl, a line of compressed, a row.

    spans: of characters, rising, of which the tokens count; None: all of them.
    """

    text: str
    num_bytes: int
    position: str
    spans: Sequence[Span] | None = None


@dataclass(frozen=True)
class TokenDocument:
    """A document that is token ids already."""

    tokens: npt.NDArray[np.int64]
    position: str


@dataclass(frozen=True, slots=True)
class Reject:
    """One record that gives no document; position as in `Document`."""

    position: str
    reason: str


Record = Document | TokenDocument | Reject


# What gzip, zlib and zstd raise for broken streams; an OSError with a number is the disk's and is not for us.
DAMAGED = "damaged"  # begins the reason of each reject that stands for a file, or the rest of one
_STREAM_ERRORS = (EOFError, OSError, zlib.error)


class SegmentReader:
    """Iterate over a segment's documents and rejects; `covered_bytes` then says how much of a plain jsonl it read.

    OSError of the disk passes through.
    """

    def __init__(
        self,
        segment: Segment,
        text_column: str,
        reason_to_drop: Filter | None = None,
        end_id: int | None = None,
        dialogues: Dialogues | None = None,
    ) -> None:
        self.segment, self.text_column, self.end_id, self.dialogues = segment, text_column, end_id, dialogues
        self.columns = (text_column,) if dialogues is None else dialogues.columns
        self.reason_to_drop = reason_to_drop
        self.covered_bytes = 0

    def __iter__(self) -> Iterator[Record]:
        kind = self.segment.file.kind
        if kind in TOKEN_KINDS:
            yield from self._megatron() if kind == "megatron" else self._flat(kind)
            return
        readers = {
            "text": self._text,
            "jsonl": self._jsonl,
            "parquet": self._parquet,
            "arrow": self._arrow,
            "mds": self._mds,
        }
        for item in readers[kind]():
            if self.reason_to_drop and isinstance(item, TokenDocument):
                raise ValueError(f"{self.segment.file.shown} holds tokens in {self.text_column!r}; {NO_FILTERS}")
            reason = self.reason_to_drop(item.text) if self.reason_to_drop and isinstance(item, Document) else None
            yield item if reason is None else Reject(item.position, reason)

    def _text(self) -> Iterator[Record]:
        file = self.segment.file
        try:
            with open_input(file) as stream:
                content = _read_at_most(stream, MAX_DOCUMENT_BYTES + 1)
                if len(content) > MAX_DOCUMENT_BYTES:
                    yield Reject(file.name, TOO_LONG)
                    return
                text = content.decode()
        except UnicodeDecodeError as error:
            yield Reject(file.name, f"not UTF-8: {error.reason} at byte {error.start}")
        except _STREAM_ERRORS as error:
            if is_of_the_disk(error):
                raise
            yield Reject(file.name, f"{DAMAGED} compressed file: {error}")
        else:
            yield self._check_text(text, file.name)

    def _jsonl(self) -> Iterator[Record]:
        file = self.segment.file
        number = 0
        try:
            with open_input(file) as stream:
                for offset, line in self._lines(stream):
                    number += 1
                    if line.isspace():
                        continue
                    # To count lines costs the reading of all before: `rejects.place_of` does it for the one it prints.
                    position = f"{file.name}:{f'line {number}' if offset is None else f'byte {offset}'}"
                    is_whole = len(line) <= MAX_DOCUMENT_BYTES
                    yield self._parse(line, position) if is_whole else Reject(position, TOO_LONG)
        except _STREAM_ERRORS as error:
            if is_of_the_disk(error):
                raise
            yield Reject(f"{file.name}:line {number + 1}", f"{DAMAGED} compressed file, the rest is lost: {error}")

    def _lines(self, stream: IO[bytes]) -> Iterator[tuple[int | None, bytes]]:
        """Iterate over (offset, line) of lines whose first byte is in the segment; offset None in compressed files.

        Of a line that is longer than MAX_DOCUMENT_BYTES one byte more than that is given, and the rest read over.
        """
        if self.segment.file.compression != "none":
            while (found := self._line(stream))[1]:
                yield None, found[0]
            return
        offset = self.segment.start
        if offset:
            # From one byte before: if that ends a line, the segment's first byte begins one. And not beyond the segment:
            # a line across many would be read by each of them to its end.
            stream.seek(offset - 1)
            before = stream.readline(self.segment.stop - offset + 1)
            if not before.endswith(b"\n"):
                return
            offset += len(before) - 1
        while offset < self.segment.stop:
            line, num_bytes = self._line(stream)
            if not line:
                return
            self.covered_bytes += num_bytes
            yield offset, line
            offset += num_bytes

    def _line(self, stream: IO[bytes]) -> tuple[bytes, int]:
        """A line, as far as it may be long, and its whole length."""
        line = stream.readline(MAX_DOCUMENT_BYTES + 1)
        num_bytes = len(line)
        while num_bytes > MAX_DOCUMENT_BYTES and not line.endswith(b"\n") and (rest := stream.readline(BUFFER_BYTES)):
            num_bytes += len(rest)
            if rest.endswith(b"\n"):
                break
        return line, num_bytes

    def _parse(self, line: bytes, position: str) -> Record:
        try:
            record = load_json(line)
        except (ValueError, RecursionError) as error:
            return Reject(position, f"not JSON: {error}")
        if not isinstance(record, dict) or self.columns[0] not in record:
            return Reject(position, f"no field {self.columns[0]!r}")
        if self.dialogues is not None:
            return self._check_record(record, position)
        return self._check_text(record[self.text_column], position)

    def _parquet(self) -> Iterator[Record]:
        file = self.segment.file
        try:
            with open_seekable(file) as opened:
                table = pyarrow.parquet.ParquetFile(opened)
                if (problem := self._column_problem(table.schema_arrow)) is not None:
                    yield Reject(file.name, problem)
                    return
                columns = self._columns_of(table.schema_arrow)
                whole = file.compression != "none"  # then the segment is the file, in bytes
                for group in range(table.num_row_groups) if whole else range(self.segment.start, self.segment.stop):
                    row = 0
                    for batch in table.iter_batches(BATCH_ROWS, [group], columns, use_threads=False):
                        for cells in zip(*(batch.column(name) for name in columns)):
                            yield self._check_cells(columns, cells, f"{file.name}:group {group} row {row}")
                            row += 1
        except (pyarrow.ArrowException, *_STREAM_ERRORS) as error:
            if is_of_the_disk(error):
                raise
            yield Reject(file.name, f"damaged parquet: {error}")

    def _arrow(self) -> Iterator[Record]:
        """A Hugging Face dataset saved to disk is one or more Arrow streams; `datasets` is not needed to read them."""
        file = self.segment.file
        try:
            with open_seekable(file) as opened, pyarrow.ipc.open_stream(opened) as stream:
                if (problem := self._column_problem(stream.schema)) is not None:
                    yield Reject(file.name, problem)
                    return
                row, columns = 0, self._columns_of(stream.schema)
                for batch in stream:
                    held = [batch.column(name) for name in columns]
                    for column in held:
                        check_offsets(column)
                    for cells in zip(*held):
                        yield self._check_cells(columns, cells, f"{file.name}:row {row}")
                        row += 1
        except (pyarrow.ArrowException, *_STREAM_ERRORS) as error:
            if is_of_the_disk(error):
                raise
            yield Reject(file.name, f"damaged arrow stream: {error}")

    def _mds(self) -> Iterator[Record]:
        file = self.segment.file
        try:
            with open_seekable(file) as opened:
                shard = read_mds_shard(opened, opened.size() if file.compression != "none" else file.num_bytes)
                columns = [*self.columns, *(name for name in self._more_columns() if name in shard.names)]
                problems = filter(None, map(shard.column_problem, columns))
                if (problem := next(problems, None)) is not None:
                    yield Reject(file.name, problem)
                    return
                whole = file.compression != "none"
                for number in range(shard.num_samples) if whole else range(self.segment.start, self.segment.stop):
                    yield self._check_sample(shard, opened, number, columns)
        except (DamagedShardError, pyarrow.ArrowException, *_STREAM_ERRORS) as error:
            if is_of_the_disk(error):
                raise
            yield Reject(file.name, f"{DAMAGED} MDS shard: {error}")

    def _check_sample(self, shard: MdsShard, opened: Any, number: int, columns: Sequence[str]) -> Record:
        """Check a sample of an MDS shard: text or ids, or those of a dialogue."""
        position = f"{self.segment.file.name}:sample {number}"
        try:
            values = shard.read(opened, number, columns)
        except UnicodeDecodeError as error:
            return Reject(position, f"not UTF-8: {error.reason} at byte {error.start}")
        if self.dialogues is not None:
            return self._check_record(dict(zip(columns, values)), position)
        (value,) = values
        return self._check_ids(value, position) if isinstance(value, np.ndarray) else self._check_text(value, position)

    def _more_columns(self) -> Sequence[str]:
        """Columns that are read where a file has them."""
        return () if self.dialogues is None else self.dialogues.optional_columns

    def _megatron(self) -> Iterator[TokenDocument | Reject]:
        file = self.segment.file
        index = read_megatron_index(file.path, file.open_next, file.num_bytes)
        documents = read_megatron_documents(index, self.segment.start, self.segment.stop)
        for number, tokens in enumerate(documents, start=self.segment.start):
            position = f"{file.name}:document {number}"
            yield TokenDocument(tokens, position) if len(tokens) else Reject(position, "empty document")

    def _flat(self, kind: str) -> Iterator[TokenDocument | Reject]:
        file, end_id = self.segment.file, self.end_id
        assert end_id is not None, "a unit knows the store's end token"
        flat = read_flat_tokens(kind, file.path, file.num_bytes, file.open_next)
        for place, tokens in read_flat_documents(flat, self.segment.start, self.segment.stop, end_id, file.open_next):
            position = f"{file.name}:token {place}"
            is_empty = not len(tokens) or (len(tokens) == 1 and tokens[0] == end_id)
            yield Reject(position, "empty document") if is_empty else TokenDocument(tokens, position)

    def _column_problem(self, schema: pyarrow.Schema) -> str | None:
        found = (column_problem(schema, name) for name in self.columns)
        return next((problem for problem in found if problem is not None), None)

    def _columns_of(self, schema: pyarrow.Schema) -> list[str]:
        """The columns to read of a table."""
        return [*self.columns, *(name for name in self._more_columns() if schema.names.count(name) == 1)]

    def _check_cells(self, columns: Sequence[str], cells: Sequence[Any], position: str) -> Record:
        """Check the cells of a row: one with text or ids, or those of a dialogue."""
        if self.dialogues is None:
            return self._check_cell(cells[0], position)
        try:
            return self._check_record({name: cell.as_py() for name, cell in zip(columns, cells)}, position)
        except UnicodeDecodeError as error:
            return Reject(position, f"not UTF-8: {error.reason} at byte {error.start}")

    def _check_record(self, record: Mapping[str, Any], position: str) -> Record:
        """Make a document of a conversation, or of a prompt and its completion."""
        assert self.dialogues is not None, "a record is read where a part of it counts"
        try:
            text, spans = self.dialogues.read(record)
        except (ValueError, RecursionError) as error:
            return Reject(position, str(error))
        found = self._check_text(text, position)
        return replace(found, spans=spans) if isinstance(found, Document) else found

    def _check_cell(self, cell: Any, position: str) -> Record:
        """Check a cell of a column; Arrow's own type says text, and no one held its bytes to that."""
        if holds_ids(cell.type):
            ids = None if cell.values is None else cell.values.to_numpy(zero_copy_only=False)
            return self._check_ids(ids, position)
        try:
            text = cell.as_py()
        except UnicodeDecodeError as error:
            return Reject(position, f"not UTF-8: {error.reason} at byte {error.start}")
        return self._check_text(text, position)

    def _check_ids(self, ids: Any, position: str) -> TokenDocument | Reject:
        """Make a document of token ids."""
        if ids is None or not len(ids):
            return Reject(position, "empty document")
        if ids.dtype.kind not in "iu":
            return Reject(position, f"field {self.text_column!r} has a token that is missing, or none")
        return TokenDocument(ids.astype(np.int64), position)

    def _check_text(self, text: object, position: str) -> Record:
        """Make a document of a text that is not blank and has a UTF-8 form, which JSON's escapes may lack; or of token ids."""
        if isinstance(text, list) and all(type(item) is int and abs(item) < 2**63 for item in text):
            return self._check_ids(np.array(text, np.int64), position)
        if not isinstance(text, str):
            return Reject(position, f"field {self.text_column!r} is {type(text).__name__}, not text")
        if not text or text.isspace():
            return Reject(position, "empty text")
        if len(text) > MAX_DOCUMENT_BYTES:
            return Reject(position, TOO_LONG)
        if text.isascii():  # known without looking, as in most of the text
            return Document(text, len(text), position)
        try:
            return Document(text, len(text.encode()), position)
        except UnicodeEncodeError:
            return Reject(position, "text holds half a surrogate pair")


def load_json(line: bytes) -> Any:
    """As json.loads, in half the time; what the fast parser rejects the other one judges and explains."""
    try:
        return pydantic_core.from_json(line)
    except ValueError:
        return json.loads(line)


def open_input(file: InputFile) -> IO[bytes]:
    """Open a file for reading, decompressed."""
    if file.compression == "gz":
        return cast(IO[bytes], gzip.open(file.open()))
    if file.compression == "zst":
        stream: Any = pyarrow.CompressedInputStream(file.open_arrow(), "zstd")
        return cast(IO[bytes], io.BufferedReader(stream))
    return file.open()


def _read_at_most(stream: IO[bytes], most: int) -> bytearray:
    """Read a stream up to so many bytes; in pieces, because it makes room for all that it is asked for."""
    content = bytearray()
    while piece := stream.read(min(most - len(content), BUFFER_BYTES)):
        content += piece
    return content


def open_seekable(file: InputFile) -> Any:
    """Open a file for pyarrow's readers, which seek: a compressed one is decompressed into memory."""
    if file.compression == "none":
        return file.open_arrow()
    with open_input(file) as stream:
        content = _read_at_most(stream, MAX_UNPACKED_BYTES + 1)
    if len(content) > MAX_UNPACKED_BYTES:
        raise pyarrow.ArrowInvalid(f"it unpacks to more than {MAX_UNPACKED_BYTES >> 30} GiB; decompress it first")
    return pyarrow.BufferReader(content)
