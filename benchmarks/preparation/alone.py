"""A tokenizer on its own: `python -m benchmarks.preparation.alone`, a process of `python -m benchmarks.preparation`.

It gets the files and ranges of units as lines of JSON, reads their texts into memory, and encodes them when it gets
another line: SentencePiece as it comes, on one thread, by its default call and by its fastest, in turns for each batch.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from amfm.data_pipeline.prepare.documents import SegmentReader
from amfm.data_pipeline.prepare.records import Document
from amfm.data_pipeline.prepare.segments import Segment
from amfm.data_pipeline.prepare.sources import InputFile
from amfm.launch.cluster.child import open_answers
from benchmarks.data.prepare import CALLS


def to_json(segments: Sequence[Segment]) -> list[Any]:
    """Segments as values of JSON; `from_json` reads them."""
    return [[segment.file.__dict__, segment.start, segment.stop, segment.text_bytes] for segment in segments]


def from_json(values: list[Any]) -> Iterator[Segment]:
    """Invert `to_json`."""
    for file, start, stop, text_bytes in values:
        yield Segment(InputFile(**file), start, stop, text_bytes)


def read_texts(segments: Iterator[Segment], max_bytes: int) -> list[tuple[str, int]]:
    """Texts of segments and their bytes in UTF-8, up to so many of all together."""
    texts: list[tuple[str, int]] = []
    total = 0
    for segment in segments:
        for item in SegmentReader(segment, "text"):
            if isinstance(item, Document) and total < max_bytes:
                texts.append((item.text, item.num_bytes))
                total += item.num_bytes
        if total >= max_bytes:
            break
    return texts


def encode(library: Any, texts: Sequence[tuple[str, int]]) -> dict[str, dict[str, float]]:
    """Encode texts in the batches of preparation: bytes, seconds and CPU seconds by the names of CALLS."""
    from amfm.data_pipeline.prepare.unit import BATCH_DOCUMENTS

    figures = {call: {"bytes": 0.0, "seconds": 0.0, "cpu_seconds": 0.0} for call in CALLS}
    for first in range(0, len(texts), BATCH_DOCUMENTS):
        batch = texts[first : first + BATCH_DOCUMENTS]
        names = list(CALLS) if first // BATCH_DOCUMENTS % 2 else list(reversed(CALLS))
        for name in names:
            began, cpu = time.perf_counter(), time.process_time()
            library.encode([text for text, _ in batch], out_type=CALLS[name], num_threads=1)
            figures[name]["seconds"] += time.perf_counter() - began
            figures[name]["cpu_seconds"] += time.process_time() - cpu
            figures[name]["bytes"] += sum(num_bytes for _, num_bytes in batch)
    return figures


def serve(answer: Callable[[object], None]) -> None:
    """Read the model's path, then for each line with segments: read, answer, wait for a line, encode, answer."""
    from sentencepiece import SentencePieceProcessor

    from amfm.data_pipeline.memory import keep_freed_memory

    keep_freed_memory()
    library = SentencePieceProcessor(model_file=sys.argv[1])
    answer("ready")
    for line in sys.stdin:
        wanted = json.loads(line)
        texts = read_texts(from_json(wanted["segments"]), wanted["max_bytes"])
        answer("read")
        sys.stdin.readline()
        answer(encode(library, texts))
        del texts


if __name__ == "__main__":
    serve(open_answers())
