"""What `python -m benchmarks.data` measures in a separate process: the first batch of a store, and a tokenizer on its own.

Called as `python -m benchmarks.data.child first SETTINGS` or `... tokenize SETTINGS`, SETTINGS being JSON; prints
JSON objects, a line each.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch  # part of the bare process, as in training

from amfm.launch.cluster.child import open_answers

if TYPE_CHECKING:
    from amfm.data_pipeline.config import DataConfig

MAX_CHARACTERS = 100_000_000  # of text held in memory


def first_batch(settings: dict[str, Any]) -> dict[str, float]:
    """Seconds from a store's path to the first batch, and memory beyond that of the process after its imports."""
    from amfm.data_pipeline.config import DataConfig
    from amfm.data_pipeline.loader.loader import PretrainLoader

    config = DataConfig.model_validate(settings["data"])
    before, started, cpu = _resident_bytes("VmRSS"), time.perf_counter(), time.process_time()
    loader = PretrainLoader(
        config, sequence_length=settings["sequence_length"], micro_batch_size=settings["batch"], seed=1
    )
    (batch,) = loader.take(settings["batch"])
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu
    assert batch.tokens_BT.shape == (settings["batch"], settings["sequence_length"]), "a whole micro-batch comes first"
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "memory_bytes": _resident_bytes("VmHWM") - before}


def _resident_bytes(name: str) -> int:
    """Resident memory of this process, bytes: VmRSS is now, VmHWM the peak so far."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}; the memory of a process is measured only on Linux")


def tokenize(settings: dict[str, Any], answer: Callable[[object], None]) -> None:
    """Tokenize this process's share of the text, held in memory, once for each line on standard input.

    Runs SentencePiece as it comes, on one thread, with freed memory kept as in the actors of preparation. Each batch
    goes through all calls of CALLS in turns. Answers a line when ready, then tokens, seconds and CPU seconds of each
    call as JSON.
    """
    from sentencepiece import SentencePieceProcessor

    from amfm.data_pipeline.config import DataConfig
    from amfm.data_pipeline.memory import keep_freed_memory
    from benchmarks.data.prepare import CALLS

    keep_freed_memory()
    config = DataConfig.model_validate(settings["data"])
    assert config.tokenizer.model is not None, "the benchmark trains the tokenizer once and names its file"
    library = SentencePieceProcessor(model_file=config.tokenizer.model)
    batches = list(_read_batches(config, settings["share"], settings["shares"]))
    library.encode(batches[0][:8], out_type="numpy", num_threads=1)
    answer("ready")
    for _ in sys.stdin:
        figures = {call: {"tokens": 0, "seconds": 0.0, "cpu_seconds": 0.0} for call in CALLS}
        for batch, (call, out_type) in product(batches, CALLS.items()):
            started, cpu = time.perf_counter(), time.process_time()
            ids = library.encode(batch, out_type=out_type, num_threads=1)
            figures[call]["seconds"] += time.perf_counter() - started
            figures[call]["cpu_seconds"] += time.process_time() - cpu
            figures[call]["tokens"] += sum(map(len, ids))
        answer(figures)


def _read_batches(config: DataConfig, share: int, shares: int) -> Iterator[list[str]]:
    """Every `shares`-th segment of the plan, at most MAX_CHARACTERS of text."""
    from amfm.data_pipeline.prepare.documents import SegmentReader
    from amfm.data_pipeline.prepare.plan import plan_source
    from amfm.data_pipeline.prepare.records import Document
    from amfm.data_pipeline.prepare.unit import BATCH_CHARACTERS, BATCH_DOCUMENTS

    (source,) = config.sources
    batch: list[str] = []
    total = waiting = 0
    for segment in plan_source(source, config)[share::shares]:
        for item in SegmentReader(segment, source.text_column, None):
            if not isinstance(item, Document):
                continue
            batch.append(item.text)
            waiting, total = waiting + len(item.text), total + len(item.text)
            if len(batch) >= BATCH_DOCUMENTS or waiting >= BATCH_CHARACTERS or total >= MAX_CHARACTERS:
                yield batch
                batch, waiting = [], 0
            if total >= MAX_CHARACTERS:
                return
    if batch:
        yield batch


if __name__ == "__main__":
    torch.set_num_threads(1)
    task, given, answer = sys.argv[1], json.loads(sys.argv[2]), open_answers()
    if task == "first":
        answer(first_batch(given))
    else:
        tokenize(given, answer)
