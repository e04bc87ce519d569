"""A look at the text: how much there is, in how many documents, and which column of its records holds it.

So that `amfm prepare` does not fail, and enough documents are kept for validation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice

import pyarrow
import pyarrow.ipc
import pyarrow.parquet

from amfm.data_pipeline.config import SourceConfig
from amfm.data_pipeline.prepare.hub import is_hub, parse_hub
from amfm.data_pipeline.prepare.records import load_json, open_input, open_seekable
from amfm.data_pipeline.prepare.sources import InputFile, list_files

DEFAULT = "text"
LONGEST_RECORD = 2**24  # bytes
COUNTED_RECORDS = 100  # of jsonl, to know how long they are
HELD_DOCUMENTS = 10  # for validation, of texts that have many: of fewer just one may decide the loss
HELD_ROWS = 8  # for validation at least, or no document may be as long as a row
MOST_HELD = 0.2
BYTES_A_TOKEN = 4


@dataclass(frozen=True)
class Text:
    """What a look at the text told: its bytes, about how many documents, and the column of the records that holds it."""

    num_bytes: float
    documents: float
    column: str = DEFAULT

    def held_fraction(self, sequence_length: int) -> float:
        """Part of the documents to keep for validation in rows of that many tokens; 0 of a single document."""
        if self.documents < 2:
            return 0.0
        least = 0.01 if self.num_bytes < 1e9 else 0.0005
        wanted = max(HELD_DOCUMENTS / self.documents, HELD_ROWS * sequence_length * BYTES_A_TOKEN / self.num_bytes)
        return float(f"{max(least, min(MOST_HELD, wanted)):.2g}")


def describe_text(data: str) -> Text:
    """Look at the text. Raises ValueError if there is none; a data set of the Hub is taken for large, and not asked for."""
    if is_hub(data):
        parse_hub(data)
        return Text(float("inf"), float("inf"))
    files = list_files(SourceConfig(name="text", paths=(data,)))
    return Text(sum(file.num_bytes for file in files), count_documents(files), find_text_column(files, data))


def count_documents(files: Sequence[InputFile]) -> float:
    """About how many documents files hold: one each of text, records by the length of those that the first begins with.

    Infinite for Megatron's files, which are made of large texts, and where the first file cannot be read.
    """
    texts = sum(file.kind == "text" and file.num_bytes > 0 for file in files)
    records = [file for file in files if file.kind != "text"]
    if not records:
        return texts
    try:
        each = bytes_per_record(records[0])
    except (OSError, ValueError, EOFError):
        return float("inf")
    return texts + sum(file.num_bytes for file in records) / each if each else float("inf")


def bytes_per_record(file: InputFile) -> float:
    """Mean bytes in the file of the records that it begins with; 0 where that is not known."""
    if file.kind == "jsonl":
        with open_input(file) as stream:
            lengths = [
                len(line) for line in islice(iter(partial(stream.readline, LONGEST_RECORD), b""), COUNTED_RECORDS)
            ]
        return sum(lengths) / max(1, len(lengths))
    if file.kind == "megatron":
        return 0
    with open_seekable(file) as opened:
        if file.kind == "parquet":
            rows = pyarrow.parquet.ParquetFile(opened).metadata.num_rows
            return file.num_bytes / max(1, rows)
        batch = next(iter(pyarrow.ipc.open_stream(opened)), None)
        return batch.nbytes / batch.num_rows if batch is not None and batch.num_rows else 0


def find_text_column(files: Sequence[InputFile], data: str) -> str:
    """Name of the column with the text: `text` where the first record has it, else that of its longest text.

    Raises ValueError, with the names available, if the record has no text. Files that are not records have `text`,
    which no one reads. A record that cannot be read is left to `amfm prepare`, which says what is wrong with it.
    """
    first = next((file for file in files if file.kind in ("jsonl", "parquet", "arrow")), None)
    if first is None:
        return DEFAULT
    try:
        record = read_record(first)
    except (OSError, ValueError, EOFError):
        return DEFAULT
    texts = {name: value for name, value in record.items() if isinstance(value, str)}
    if DEFAULT in texts or not record:
        return DEFAULT
    if not texts:
        raise ValueError(
            f"--data {data}: the first record of {first.name} has no text; its fields are {', '.join(map(str, record))}"
        )
    return max(texts, key=lambda name: len(texts[name]))


def read_record(file: InputFile) -> dict[str, object]:
    """The first record of a file; empty if there is none. Raises OSError and ValueError if it cannot be read."""
    if file.kind == "jsonl":
        with open_input(file) as stream:
            record = load_json(stream.readline(LONGEST_RECORD) or b"{}")
        return record if isinstance(record, dict) else {}
    with open_seekable(file) as opened:
        if file.kind == "parquet":
            batches = pyarrow.parquet.ParquetFile(opened).iter_batches(batch_size=1)
        else:
            batches = iter(pyarrow.ipc.open_stream(opened))
        batch = next(batches, None)
        return dict(batch.slice(0, 1).to_pylist()[0]) if batch is not None and batch.num_rows else {}
