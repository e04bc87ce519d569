"""A look at the text: how much there is, and which column of its records holds it, so that `amfm prepare` does not fail."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow
import pyarrow.ipc
import pyarrow.parquet

from amfm.data_pipeline.config import SourceConfig
from amfm.data_pipeline.prepare.documents import load_json, open_input, open_seekable
from amfm.data_pipeline.prepare.hub import is_hub, parse_hub
from amfm.data_pipeline.prepare.sources import InputFile, list_files

DEFAULT = "text"
LONGEST_RECORD = 2**24  # bytes


@dataclass(frozen=True)
class Text:
    """What a look at the text told: its bytes, and the column of the records that holds it."""

    num_bytes: float
    column: str = DEFAULT


def look_at(data: str) -> Text:
    """Look at the text. Raises ValueError where there is none; a data set of the Hub is taken for large, and not asked for."""
    if is_hub(data):
        parse_hub(data)
        return Text(float("inf"))
    files = list_files(SourceConfig(name="text", paths=(data,)))
    return Text(sum(file.num_bytes for file in files), find_text_column(files, data))


def find_text_column(files: Sequence[InputFile], data: str) -> str:
    """Name of the column with the text: `text` where the first record has it, else that of its longest text.

    Raises ValueError, with the names available, where the record has no text. Files that aren't records have `text`,
    which no one reads. A record that can't be read is left to `amfm prepare`, which says what is wrong with it.
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
    """The first record of a file; empty where there is none. Raises OSError and ValueError where it can't be read."""
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
