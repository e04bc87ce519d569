"""What `amfm bench data` measures in a process of its own: the first batch of a store, and a tokenizer alone.

Called as `python -m launch.bench_data_child first SETTINGS` or `... tokenize SETTINGS`, SETTINGS being JSON; prints one
JSON object.
"""

from __future__ import annotations

import json
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Any

import torch  # part of the bare process, as in training


def first_batch(settings: dict[str, Any]) -> dict[str, float]:
    """Seconds from a path to a batch, and memory on top of what the process had with its imports done."""
    from data_pipeline.config import DataConfig
    from data_pipeline.loader import PretrainLoader

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
    """VmRSS: memory now; VmHWM: at most so far."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}; the memory of a process is measured on Linux alone")


def tokenize(settings: dict[str, Any]) -> dict[str, float]:
    """Tokenize texts that are in memory, in batches as preparation does; waits for a line on standard input first."""
    from data_pipeline.config import DataConfig
    from data_pipeline.documents import Document, SegmentReader
    from data_pipeline.prepare_plan import plan_source
    from data_pipeline.prepare_unit import BATCH_DOCUMENTS
    from data_pipeline.tokenizer import read_tokenizer_file

    config = DataConfig.model_validate(settings["data"])
    (source,) = config.sources
    texts = (
        item.text
        for segment in plan_source(source, config)
        for item in SegmentReader(segment, source.text_column, None)
        if isinstance(item, Document)
    )
    batches, waiting, total = [], [], 0
    for text in texts:
        waiting.append(text)
        total += len(text)
        if len(waiting) == BATCH_DOCUMENTS or total >= settings["characters"]:
            batches.append(waiting)
            waiting = []
        if total >= settings["characters"]:
            break
    batches += [waiting] if waiting else []
    assert config.tokenizer.model is not None, "the benchmark trains the tokenizer once and names its file"
    tokenizer = read_tokenizer_file(Path(config.tokenizer.model))
    tokenizer.encode_batch(list(islice(batches[0], 8)))
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    sys.stdin.readline()
    started, cpu = time.perf_counter(), time.process_time()
    tokens = sum(len(ids) for batch in batches for ids in tokenizer.encode_batch(batch))
    return {"tokens": tokens, "seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - cpu}


if __name__ == "__main__":
    torch.set_num_threads(1)
    task, given = sys.argv[1], json.loads(sys.argv[2])
    sys.stdout.write(json.dumps({"first": first_batch, "tokenize": tokenize}[task](given)) + "\n")
