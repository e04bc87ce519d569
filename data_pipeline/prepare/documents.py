"""Readers: files, byte ranges and row groups become documents, and what cannot be used becomes a reject with a reason.

A source of terabytes has damaged lines, so a bad record never stops a preparation: it is a reject with its position, and the
rest continues. What is not the record's fault stops it: errors of the disk carry an errno and are raised, while those
of a broken compressed stream do not. Plain jsonl is read in byte ranges that begin anywhere; a line belongs to the
range that holds its first byte, so ranges need no knowledge of each other and cover every line once.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import IO, Any

import numpy as np
import pyarrow
import pyarrow.ipc
import pyarrow.parquet

from amfm.data_pipeline.prepare.dialogues import Dialogues
from amfm.data_pipeline.prepare.reading import (
    AS_IT_IS,
    Filter,
    Reading,
    cut_stream,
    find_field,
    top_field,
)
from amfm.data_pipeline.prepare.records import (
    DAMAGED,
    MAX_DOCUMENT_BYTES,
    MAX_UNPACKED_BYTES,
    STREAM_ERRORS,
    TOO_LONG,
    Document,
    Record,
    Reject,
    TokenDocument,
    check_ids,
    check_text,
    load_json,
    open_input,
    open_seekable,
    read_at_most,
    read_line,
)
from amfm.data_pipeline.prepare.segments import (
    Segment,
    check_offsets,
    column_problem,
    holds_ids,
    is_of_the_disk,
)
from amfm.data_pipeline.prepare.sources import TOKEN_KINDS
from amfm.data_pipeline.store.mds_files import DamagedShardError, MdsShard, read_mds_shard
from amfm.data_pipeline.store.megatron_files import read_megatron_documents, read_megatron_index
from amfm.data_pipeline.store.token_files import read_flat_documents, read_flat_tokens

NAME_TOKENIZER = ", which mean nothing to a tokenizer trained here; name the file of the tokenizer that made them in data.tokenizer.model, or give only sources of tokens, with the id that ends documents in data.tokenizer.eos_token"
NO_FILTERS = "filters need text; remove them"
BATCH_ROWS = 1024  # of parquet that memory holds at once: a small file may unpack to 10^9 equal cells


class SegmentReader:
    """Iterate over a segment's documents and rejects; `covered_bytes`: of a plain jsonl that was read. Errors of the disk pass."""

    def __init__(
        self,
        segment: Segment,
        text_column: str,
        reason_to_drop: Filter | None = None,
        end_id: int | None = None,
        dialogues: Dialogues | None = None,
        reading: Reading = AS_IT_IS,
    ) -> None:
        self.reading, template = reading, reading.template
        self.segment, self.text_column, self.end_id, self.dialogues = segment, text_column, end_id, dialogues
        self.columns = (text_column,) if dialogues is None else dialogues.columns
        if template is not None:
            self.columns = template.columns
        self.reads_records = dialogues is not None or template is not None or bool(reading.steps)
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
            "own": self._own,
        }
        for item in readers[kind]():
            if (self.reason_to_drop or self.reading.steps) and isinstance(item, TokenDocument):
                raise ValueError(f"{self.segment.file.shown} holds tokens in {self.text_column!r}; {NO_FILTERS}")
            reason = self.reason_to_drop(item.text) if self.reason_to_drop and isinstance(item, Document) else None
            yield self._take_steps(item) if reason is None else Reject(item.position, reason)

    def _take_steps(self, item: Record) -> Record:
        """Filters and transforms of users, in order; errors of theirs pass."""
        for step in self.reading.steps:
            if not isinstance(item, Document):
                break
            record = item.record or {}
            found = step.function(item.text, record)
            if not step.is_filter:
                changed = check_text(found, self.text_column, item.position)
                item = replace(changed, record=record) if isinstance(changed, Document) else changed
            elif found is not None:
                item = Reject(item.position, f"filter: {step.name}: {found}")
        return item

    def _text(self) -> Iterator[Record]:
        file = self.segment.file
        if self.reading.cut is not None:
            yield from self._cut_text()
            return
        try:
            with open_input(file) as stream:
                content = read_at_most(stream, MAX_DOCUMENT_BYTES + 1)
                if len(content) > MAX_DOCUMENT_BYTES:
                    yield Reject(file.name, TOO_LONG)
                    return
                text = self.reading.decode(content)
        except UnicodeDecodeError as error:
            yield self._undecodable(file.name, error)
        except STREAM_ERRORS as error:
            if is_of_the_disk(error):
                raise
            yield Reject(file.name, f"{DAMAGED} compressed file: {error}")
        else:
            yield check_text(text, self.text_column, file.name)

    def _undecodable(self, position: str, error: UnicodeDecodeError) -> Reject:
        name = "UTF-8" if self.reading.encoding == "utf-8" else self.reading.encoding
        return Reject(position, f"not {name}: {error.reason} at byte {error.start}")

    def _cut_text(self) -> Iterator[Record]:
        """The documents that a file of text is cut into, of which the first bytes are in the segment."""
        file, cut = self.segment.file, self.reading.cut
        assert cut is not None, "asked by who knows"
        start, stop = self.segment.start, self.segment.stop
        try:
            with open_input(file) as opened:
                stream: IO[bytes] = opened
                if file.compression != "none":
                    stream = io.BytesIO(read_at_most(opened, MAX_UNPACKED_BYTES + 1))
                    start, stop = 0, stream.getbuffer().nbytes
                    if stop > MAX_UNPACKED_BYTES:
                        yield Reject(
                            file.name, f"unpacks to more than {MAX_UNPACKED_BYTES >> 30} GiB; decompress it first"
                        )
                        return
                for offset, content in cut_stream(stream, start, stop, cut, self.reading.encoding):
                    if content.isspace() or not content:
                        continue
                    position = f"{file.name}:byte {offset}"
                    try:
                        text = self.reading.decode(content)
                    except UnicodeDecodeError as error:
                        yield self._undecodable(position, error)
                        continue
                    is_whole = len(content) <= MAX_DOCUMENT_BYTES
                    yield check_text(text, self.text_column, position) if is_whole else Reject(position, TOO_LONG)
        except STREAM_ERRORS as error:
            if is_of_the_disk(error):
                raise
            yield Reject(file.name, f"{DAMAGED} compressed file: {error}")

    def _own(self) -> Iterator[Record]:
        """What a user's reader makes of a file: texts, or records with fields."""
        file = self.segment.file
        number, read = 0, dict(self.reading.readers)[file.suffix].function
        try:
            with open_input(file) as stream:
                for found in read(stream):
                    position = f"{file.name}:document {number}"
                    number += 1
                    is_text = isinstance(found, str)
                    yield (
                        check_text(found, self.text_column, position)
                        if is_text
                        else self._check_record(found, position)
                    )
        except (ValueError, *STREAM_ERRORS) as error:
            if is_of_the_disk(error):
                raise
            yield Reject(f"{file.name}:document {number}", f"{DAMAGED} file, the rest is lost: {error}")

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
        except STREAM_ERRORS as error:
            if is_of_the_disk(error):
                raise
            yield Reject(f"{file.name}:line {number + 1}", f"{DAMAGED} compressed file, the rest is lost: {error}")

    def _lines(self, stream: IO[bytes]) -> Iterator[tuple[int | None, bytes]]:
        """Iterate over (offset, line) of lines whose first byte is in the segment; offset None in compressed files.

        Of a line that is longer than MAX_DOCUMENT_BYTES one byte more than that is given, and the rest read over.
        """
        if self.segment.file.compression != "none":
            while (found := read_line(stream))[1]:
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
            line, num_bytes = read_line(stream)
            if not line:
                return
            self.covered_bytes += num_bytes
            yield offset, line
            offset += num_bytes

    def _parse(self, line: bytes, position: str) -> Record:
        try:
            record = load_json(self.reading.decode(line).encode() if self.reading.recodes else line)
        except UnicodeDecodeError as error:
            return (
                self._undecodable(position, error) if self.reading.recodes else Reject(position, f"not JSON: {error}")
            )
        except (ValueError, RecursionError) as error:
            return Reject(position, f"not JSON: {error}")
        if not isinstance(record, dict):
            return Reject(position, f"no field {self.columns[0]!r}")
        if self.reads_records or self.text_column not in record:
            return self._check_record(record, position)
        return check_text(record[self.text_column], self.text_column, position)

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
        except (pyarrow.ArrowException, *STREAM_ERRORS) as error:
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
        except (pyarrow.ArrowException, *STREAM_ERRORS) as error:
            if is_of_the_disk(error):
                raise
            yield Reject(file.name, f"damaged arrow stream: {error}")

    def _mds(self) -> Iterator[Record]:
        file = self.segment.file
        try:
            with open_seekable(file) as opened:
                shard = read_mds_shard(opened, opened.size() if file.compression != "none" else file.num_bytes)
                columns = self._columns_among(shard.names)
                problems = filter(None, map(shard.column_problem, columns))
                if (problem := next(problems, None)) is not None:
                    yield Reject(file.name, problem)
                    return
                whole = file.compression != "none"
                for number in range(shard.num_samples) if whole else range(self.segment.start, self.segment.stop):
                    yield self._check_sample(shard, opened, number, columns)
        except (DamagedShardError, pyarrow.ArrowException, *STREAM_ERRORS) as error:
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
        if self.reads_records or columns[0] != self.text_column:
            return self._check_record(dict(zip(columns, values)), position)
        value = values[0]
        return (
            check_ids(value, self.text_column, position)
            if isinstance(value, np.ndarray)
            else check_text(value, self.text_column, position)
        )

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
        found = (column_problem(schema, top_field(name, schema.names)) for name in self.columns)
        return next((problem for problem in found if problem is not None), None)

    def _columns_of(self, schema: pyarrow.Schema) -> list[str]:
        """The columns to read of a table."""
        return self._columns_among([name for name in schema.names if schema.names.count(name) == 1])

    def _columns_among(self, names: Sequence[str]) -> list[str]:
        """The columns to read: those of the fields, and for conversations and steps the others that there are."""
        more = names if self.reading.steps else self._more_columns()
        return list(
            dict.fromkeys((*(top_field(name, names) for name in self.columns), *(n for n in more if n in names)))
        )

    def _check_cells(self, columns: Sequence[str], cells: Sequence[Any], position: str) -> Record:
        """Check the cells of a row: one with text or ids, or those of a dialogue."""
        if not self.reads_records and columns[0] == self.text_column:
            return self._check_cell(cells[0], position)
        try:
            return self._check_record({name: cell.as_py() for name, cell in zip(columns, cells)}, position)
        except UnicodeDecodeError as error:
            return Reject(position, f"not UTF-8: {error.reason} at byte {error.start}")

    def _check_record(self, record: Mapping[str, Any], position: str) -> Record:
        """Make a document of a field, of a template's fields, of a conversation, or of a prompt and its completion."""
        spans, template = None, self.reading.template
        try:
            if self.dialogues is not None:
                text, spans = self.dialogues.read(record)
            else:
                text = find_field(record, self.text_column) if template is None else template.read(record)
        except (ValueError, RecursionError) as error:
            return Reject(position, str(error))
        found = check_text(text, self.text_column, position)
        return replace(found, spans=spans, record=record) if isinstance(found, Document) else found

    def _check_cell(self, cell: Any, position: str) -> Record:
        """Check a cell of a column; Arrow's own type says text, and no one held its bytes to that."""
        if holds_ids(cell.type):
            ids = None if cell.values is None else cell.values.to_numpy(zero_copy_only=False)
            return check_ids(ids, self.text_column, position)
        try:
            text = cell.as_py()
        except UnicodeDecodeError as error:
            return Reject(position, f"not UTF-8: {error.reason} at byte {error.start}")
        return check_text(text, self.text_column, position)
