"""`python -m benchmarks.data`: sample readers of ours and of public peers, preparation, first batch of a huge store, cold reads.

How it works: one text is tokenized once and written in every format, so that all readers give the same tokens. Readers
take turns in rounds, the first of which is not counted; CPU seconds are compared, and wall seconds stand next to them.
What needs a clean process (the first batch, only the tokenizer) runs in a child.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from amfm.data_pipeline.config import SourceConfig
from amfm.data_pipeline.durable.files import write_file_atomically
from amfm.data_pipeline.prepare.documents import SegmentReader
from amfm.data_pipeline.prepare.plan import plan_source
from amfm.data_pipeline.prepare.records import Document
from amfm.data_pipeline.prepare.sample_text import collect_python_sources
from amfm.data_pipeline.store.store import TokenStore
from amfm.data_pipeline.tokenizer.sentencepiece_model import train_tokenizer
from amfm.pretrain.monitor.environment import read_processor_name
from benchmarks.data.cold import measure_cold_reads
from benchmarks.data.files import PRESETS, BenchData, export_for_megatron, make_huge_store, recode_store
from benchmarks.data.prepare import measure_preparation
from benchmarks.data.readers import (
    Reader,
    megatron_readers,
    memmap_reader,
    our_reader,
    streaming_reader,
    zarr_reader,
)

YARDSTICK = "megatron_gpt_dataset"
SLOW_READERS = {"zarr_python": 8}  # this many times fewer samples: a round of them takes as long as all others together


def bench_data(settings: BenchData, report: Callable[[str], None]) -> dict[str, Any]:
    """Make the stores, then measure; returns rows, preparation, first_batch, cold and hardware as JSON values.

    Sets torch to one thread for the process, so that CPU seconds are only those of the reading.
    """
    torch.set_num_threads(1)
    settings.work.mkdir(parents=True, exist_ok=True)
    _prepare_tokenizer(settings, report)
    preparation = measure_preparation(settings, report)
    store = TokenStore.open(settings.work / "fast")
    stores = {"fast": store}
    for preset in PRESETS[1:]:
        report(f"writing the parts as {preset}")
        stores[preset] = recode_store(store, settings.work / preset, preset)
    report("writing the tokens for the peers")
    prefix = settings.work / "megatron"
    num_bytes = export_for_megatron(store, prefix)
    readers, remarks = _open_readers(settings, stores, prefix, num_bytes)
    rows = time_readers(settings, readers, report)
    report(f"first batch of {settings.huge_tokens:.0e} tokens")
    return {
        "sample": {"tokens": settings.sequence_length, "batch": settings.batch, "samples": settings.samples},
        "rounds": settings.rounds,
        "text_megabytes": round(preparation["text_bytes"] / 1e6, 1),
        "tokens_per_document": round(
            preparation["tokens"] / sum(part.num_documents for _, _, part in store.all_parts())
        ),
        "rows": rows,
        "preparation": preparation,
        "first_batch": measure_first_batch(settings, store),
        "cold": measure_cold_reads(settings, stores, prefix.with_suffix(".bin"), report),
        "hardware": describe_machine(),
        "remarks": remarks,
    }


def collect_text(work: Path, megabytes: int) -> tuple[str, ...]:
    """Default text of the benchmark: installed Python sources, collected once into `work`."""
    collect_python_sources(work / "python_sources", megabytes)
    return (str(work / "python_sources"),)


def _prepare_tokenizer(settings: BenchData, report: Callable[[str], None]) -> None:
    """Train the tokenizer once; later runs in the same folder find it there, so that their tokens are the same."""
    file = settings.work / "tokenizer.model"
    if file.exists():
        return
    report(f"training a tokenizer of {settings.vocab_size} pieces")
    config = settings.data_config("fast")
    (source,) = config.sources
    write_file_atomically(file, train_tokenizer(_training_texts(source, settings), config.tokenizer).to_bytes())


def _training_texts(source: SourceConfig, settings: BenchData) -> Iterator[str]:
    """Documents of the text, up to the characters that the tokenizer trains on."""
    config = settings.data_config("fast")
    left = config.tokenizer.training_bytes
    for segment in plan_source(source, config):
        for item in SegmentReader(segment, source.text_column, None):
            if left <= 0:
                return
            if isinstance(item, Document):
                left -= len(item.text)
                yield item.text


def _open_readers(
    settings: BenchData, stores: dict[str, TokenStore], prefix: Path, num_bytes: int
) -> tuple[list[Reader], list[str]]:
    """All readers that can run here, and a warning for each that is missing."""
    store = stores["fast"]
    readers = [our_reader(settings, stores[preset]) for preset in PRESETS]
    readers += megatron_readers(settings, store, prefix, num_bytes)
    streaming = streaming_reader(settings, store, settings.work / "streaming")
    readers += [streaming] if streaming else []
    readers.append(memmap_reader(settings, store, prefix.with_suffix(".bin")))
    readers += [zarr_reader(settings, stores[preset]) for preset in ("fast", "small")]
    missing = "MosaicML streaming is not installed: pip install mosaicml-streaming, in a separate environment"
    return readers, [] if streaming else [missing]


def time_readers(settings: BenchData, readers: Sequence[Reader], report: Callable[[str], None]) -> list[dict[str, Any]]:
    """Time readers in turns; returns medians of CPU and wall microseconds per sample, one row per reader.

    The first round warms up and is not counted. Ratios are to megatron-core's GPTDataset.
    """
    cpu: list[list[float]] = [[] for _ in readers]
    wall: list[list[float]] = [[] for _ in readers]
    for turn in range(settings.rounds + 1):
        report(f"reading: round {turn} of {settings.rounds}")
        for number, reader in enumerate(readers):
            # Every round reads new samples, so that no reader finds the last round's windows in a cache.
            samples = max(1, settings.samples // SLOW_READERS.get(reader.name, 1) // settings.batch) * settings.batch
            started, cpu_started = time.perf_counter(), time.process_time()
            for first in range(turn * samples, (turn + 1) * samples, settings.batch):
                for _ in reader.read(first):
                    pass
            if turn:
                cpu[number].append((time.process_time() - cpu_started) / samples * 1e6)
                wall[number].append((time.perf_counter() - started) / samples * 1e6)
    base = next((statistics.median(cpu[n]) for n, reader in enumerate(readers) if reader.name == YARDSTICK), None)
    return [
        {
            "reader": reader.name,
            "preset": reader.preset,
            "microseconds_per_sample": statistics.median(cpu[number]),
            "microseconds_min": min(cpu[number]),
            "wall_microseconds_per_sample": statistics.median(wall[number]),
            "bytes_per_token": reader.bytes_per_token,
            "documents": reader.documents,
            "checksum": reader.checksum,
            "times_as_fast_as_gpt_dataset": base / statistics.median(cpu[number]) if base else None,
        }
        for number, reader in enumerate(readers)
    ]


def measure_first_batch(settings: BenchData, store: TokenStore) -> dict[str, Any]:
    """Seconds and memory until the first batch of a store of `huge_tokens` in a fresh process.

    Taken twice; the second counts, when files are in the page cache. Raises RuntimeError when the child fails.
    """
    folder = settings.work / "huge"
    records = make_huge_store(store, folder, settings.huge_tokens)
    config = settings.data_config("huge").model_dump(mode="json")
    arguments = {"data": config, "sequence_length": settings.sequence_length, "batch": settings.batch}
    command = [sys.executable, "-m", "benchmarks.data.child", "first", json.dumps(arguments)]
    for _ in range(2):
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise RuntimeError("the process that reads the first batch failed; its message is above")
    return {"tokens": settings.huge_tokens, "parts": records, **json.loads(done.stdout)}


def describe_machine() -> dict[str, Any]:
    """Processor and versions that the numbers were taken with."""
    return {
        "processor": read_processor_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "torch": torch.__version__,
        "megatron_core": importlib.metadata.version("megatron-core"),
        "zarr": importlib.metadata.version("zarr"),
    }
