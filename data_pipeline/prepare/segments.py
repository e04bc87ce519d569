"""Columns and segments of files: whether a table holds the text or the ids that are asked for, and what is read in one go.

Of segments (bytes, rows, samples or documents) sizes, footers and indexes are read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow
import pyarrow.parquet

from amfm.data_pipeline.config import CutConfig
from amfm.data_pipeline.prepare.sources import TOKEN_KINDS, InputFile
from amfm.data_pipeline.store.mds_files import DamagedShardError, read_mds_shard
from amfm.data_pipeline.store.megatron_files import read_megatron_index
from amfm.data_pipeline.store.token_files import FLAT_KINDS, read_flat_tokens

FOOTER_SHARE = 8  # a segment of parquet is at least so many times its file's footer, which each segment parses


def read_footer(file: InputFile) -> tuple[Any, pyarrow.Schema]:
    """Read metadata and schema of a parquet file; ValueError when it is none, because the plan needs its row groups."""
    try:
        with file.open_arrow() as opened:
            metadata = pyarrow.parquet.read_metadata(opened)
            return metadata, metadata.schema.to_arrow_schema()
    except (pyarrow.ArrowException, OSError) as error:
        if is_of_the_disk(error):
            raise
        raise ValueError(f"{file.shown} is not a whole parquet file; restore or remove it") from error


def check_column(files: Sequence[InputFile], text_column: str, *, holds_text: bool = True) -> None:
    """Raise ValueError if no parquet file can have text in the column: footers tell it before anything is read.

    holds_text: what else it may hold is judged record by record.

    Files are looked at up to the first that can. Compressed ones and those of other kinds are left to their readers.
    """
    problem = ""
    for file in files:
        if file.kind != "parquet" or file.compression != "none":
            return
        _, schema = read_footer(file)
        if text_column not in schema.names and "." in text_column and text_column.partition(".")[0] in schema.names:
            return  # what is inside is judged row by row
        if (found := column_problem(schema, text_column)) is not None:
            problem = problem or f"{file.shown} has {found}"
            continue
        kind = schema.field(text_column).type
        if not holds_text or holds_ids(kind) or not (pyarrow.types.is_primitive(kind) or pyarrow.types.is_nested(kind)):
            return
        problem = problem or f"column {text_column!r} of {file.shown} holds {kind}, not text"
    if problem:
        raise ValueError(f"{problem}; set text_column to the column with text")


def holds_tokens(files: Sequence[InputFile], text_column: str) -> bool:
    """Whether a source has token ids in place of text, as far as names and the footer of its first parquet file say."""
    for file in files:
        if file.kind in TOKEN_KINDS:
            return True
        if file.kind == "parquet" and file.compression == "none":
            _, schema = read_footer(file)
            return text_column in schema.names and holds_ids(schema.field(text_column).type)
    return False


def holds_ids(kind: pyarrow.DataType) -> bool:
    """Whether cells of a column are lists of integers."""
    is_list = pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind)
    return is_list and pyarrow.types.is_integer(kind.value_type)


def column_problem(schema: pyarrow.Schema, text_column: str) -> str | None:
    """Why a table has not one column of this name; None if it has."""
    number = schema.names.count(text_column)
    if number == 1:
        return None
    return f"{'no column' if number == 0 else f'{number} columns'} {text_column!r} among {', '.join(schema.names)}"


def check_offsets(column: Any) -> None:
    """Raise ArrowInvalid for a column whose cells are outside of its bytes: to look at one would end the process.

    Cells that are not UTF-8 pass, because each of them is a reject of its own.
    """
    try:
        column.validate(full=True)
    except pyarrow.ArrowInvalid:
        binary = {pyarrow.string(): pyarrow.binary(), pyarrow.large_string(): pyarrow.large_binary()}.get(column.type)
        if binary is None:
            raise
        column.validate()  # or the view itself is not sound
        column.view(binary).validate(full=True)


def is_of_the_disk(error: Exception) -> bool:
    """Whether an error is the disk's: a broken compressed stream carries no number."""
    return isinstance(error, OSError) and error.errno is not None


@dataclass(frozen=True)
class Segment:
    """What is read in one go: bytes [start, stop) of jsonl, row groups of parquet, documents of an .idx, or the file.

    text_bytes: estimated text, for planning. split: of text files, and of .idx by `data.megatron_split`, decided by the
    plan; None: by content.
    """

    file: InputFile
    start: int
    stop: int
    text_bytes: int
    split: Literal["train", "validation"] | None = None


def cut_segments(
    file: InputFile, segment_bytes: int, megatron_split: str | None = None, cut: CutConfig | None = None
) -> list[Segment]:
    """Cut a file into segments of about segment_bytes that together cover it exactly once, but for what a split leaves out.

    Plain jsonl, and text that is cut into documents, by byte ranges, parquet by runs of row groups, Megatron by documents; other files are one segment. Empty
    files have none.
    """
    if file.num_bytes == 0:
        return []
    if file.kind == "parquet" and file.compression == "none":
        metadata, _ = read_footer(file)
        sizes = [metadata.row_group(number).total_byte_size for number in range(metadata.num_row_groups)]
        runs = _join_neighbours(sizes, max(segment_bytes, FOOTER_SHARE * metadata.serialized_size))
        return [Segment(file, first, stop, sum(sizes[first:stop])) for first, stop in runs]
    if file.kind in FLAT_KINDS:
        flat = read_flat_tokens(file.kind, file.path, file.num_bytes, file.open_next)
        return [Segment(file, first, stop, num_bytes) for first, stop, num_bytes in flat.cut(segment_bytes)]
    if file.kind == "megatron":
        index = read_megatron_index(file.path, file.open_next, file.num_bytes)
        index.check()
        if megatron_split is None:
            return [Segment(file, first, stop, num_bytes) for first, stop, num_bytes in index.cut(segment_bytes)]
        train, valid = index.split(megatron_split)
        cuts: tuple[tuple[Literal["train", "validation"], int, int], ...]
        cuts = (("train", 0, train), ("validation", train, valid))
        return [
            Segment(file, *run, split) for split, first, end in cuts for run in index.cut(segment_bytes, first, end)
        ]
    if file.kind == "mds" and file.compression == "none":
        return _cut_mds(file, segment_bytes)
    is_cut = file.kind == "text" and cut is not None
    if is_cut and cut is not None and cut.size is not None:
        segment_bytes = max(1, segment_bytes // cut.size) * cut.size  # the places of its cuts
    if (file.kind == "jsonl" or is_cut) and file.compression == "none":
        starts = range(0, file.num_bytes, segment_bytes)
        stops = [min(start + segment_bytes, file.num_bytes) for start in starts]
        return [Segment(file, start, stop, stop - start) for start, stop in zip(starts, stops)]
    estimate = file.num_bytes * (4 if file.compression != "none" else 1)
    return [Segment(file, 0, file.num_bytes, estimate)]


def _cut_mds(file: InputFile, segment_bytes: int) -> list[Segment]:
    """Runs of samples of a shard; a damaged one is a segment, whose reader says what is wrong."""
    try:
        with file.open() as opened:
            shard = read_mds_shard(opened, file.num_bytes)
    except DamagedShardError:
        return [Segment(file, 0, 0, file.num_bytes)]
    sizes = np.diff(shard.offsets).tolist()
    return [
        Segment(file, first, stop, sum(sizes[first:stop])) for first, stop in _join_neighbours(sizes, segment_bytes)
    ]


def _join_neighbours(sizes: Sequence[int], most: int) -> Iterator[tuple[int, int]]:
    """[first, stop) of runs of neighbours whose sizes together are at most `most`, or of one that is larger on its own."""
    first = total = 0
    for number, size in enumerate(sizes):
        if number > first and total + size > most:
            yield first, number
            first, total = number, 0
        total += size
    if sizes:
        yield first, len(sizes)
