"""Records that readers give, and files as they open them: documents, token documents, rejects; decompressed, bounded."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any, cast

import numpy as np
import numpy.typing as npt
import pyarrow
import pydantic_core

from amfm.data_pipeline.prepare.sources import BUFFER_BYTES, InputFile
from amfm.data_pipeline.tokenizer.chat_template import Span

MAX_DOCUMENT_BYTES = 2**28  # of a text, decompressed; a small file can hold one that takes a node's memory
TOO_LONG = f"longer than {MAX_DOCUMENT_BYTES >> 20} MiB, the most that a document may have"
MAX_UNPACKED_BYTES = 2**31  # of a compressed parquet or arrow file, which is held in memory


@dataclass(frozen=True, slots=True)
class Document:
    """One text, its size in UTF-8 and where it came from: a byte of plain jsonl, a line of compressed, a row.

    spans: of characters, rising, of which the tokens count; None: all of them. record: its fields, for steps.
    """

    text: str
    num_bytes: int
    position: str
    spans: Sequence[Span] | None = None
    record: Mapping[str, Any] | None = None


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
STREAM_ERRORS = (EOFError, OSError, zlib.error)


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


def read_at_most(stream: IO[bytes], most: int) -> bytearray:
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
        content = read_at_most(stream, MAX_UNPACKED_BYTES + 1)
    if len(content) > MAX_UNPACKED_BYTES:
        raise pyarrow.ArrowInvalid(f"it unpacks to more than {MAX_UNPACKED_BYTES >> 30} GiB; decompress it first")
    return pyarrow.BufferReader(content)


def read_line(stream: IO[bytes]) -> tuple[bytes, int]:
    """A line, as far as it may be long, and its whole length."""
    line = stream.readline(MAX_DOCUMENT_BYTES + 1)
    num_bytes = len(line)
    while num_bytes > MAX_DOCUMENT_BYTES and not line.endswith(b"\n") and (rest := stream.readline(BUFFER_BYTES)):
        num_bytes += len(rest)
        if rest.endswith(b"\n"):
            break
    return line, num_bytes


def check_ids(ids: Any, column: str, position: str) -> TokenDocument | Reject:
    """Make a document of token ids."""
    if ids is None or not len(ids):
        return Reject(position, "empty document")
    if ids.dtype.kind not in "iu":
        return Reject(position, f"field {column!r} has a token that is missing, or none")
    return TokenDocument(ids.astype(np.int64), position)


def check_text(text: object, column: str, position: str) -> Record:
    """Make a document of a text that is not blank and has a UTF-8 form, which JSON's escapes may lack; or of token ids."""
    if isinstance(text, list) and all(type(item) is int and abs(item) < 2**63 for item in text):
        return check_ids(np.array(text, np.int64), column, position)
    if not isinstance(text, str):
        return Reject(position, f"field {column!r} is {type(text).__name__}, not text")
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
