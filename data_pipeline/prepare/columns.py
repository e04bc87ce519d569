"""Columns of tables: whether a file has the one that is asked for, and whether that holds text or token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow
import pyarrow.parquet

from amfm.data_pipeline.prepare.sources import TOKEN_KINDS, InputFile


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
