"""Cold reads for `python -m benchmarks.data`: windows that are not in the page cache, ours and a plain mmap in turns.

How it works: before every read the file's pages are dropped (posix_fadvise) and the system gets a moment to finish
reading ahead; then a random window is read and timed, and the bytes that came from storage are counted. Bytes matter as
much as time: on shared storage they are what many hosts compete for.
"""

from __future__ import annotations

import mmap
import os
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from amfm.data_pipeline.store.store import TokenStore
from benchmarks.data.files import SOURCE, BenchData

QUIET_SECONDS = 0.02  # before a read: what the system reads ahead for the one before must not delay it


@dataclass(frozen=True)
class _ColdFile:
    """A reader whose pages can be dropped before each read; `read` takes the read's number."""

    name: str
    files: tuple[Path, ...]
    read: Callable[[int], object]
    forget: Callable[[], None]


def measure_cold_reads(
    settings: BenchData, stores: dict[str, TokenStore], flat: Path, report: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Median wall microseconds and disk bytes of reading one window that is not in the page cache.

    Empty where the system cannot drop pages. They are dropped before every read, because the system reads ahead.
    """
    if not hasattr(os, "posix_fadvise"):
        return []
    length = settings.sequence_length
    targets = [_cold_store(preset, store, length) for preset, store in stores.items()]
    targets.append(_cold_mmap(flat, stores["fast"].layout.dtype, length))
    os.sync()  # only clean pages can be dropped
    seconds: dict[str, list[float]] = {target.name: [] for target in targets}
    disk: dict[str, int] = {target.name: 0 for target in targets}
    report("reading from a cold cache")
    for number in range(settings.cold_reads):
        for target in targets:
            target.forget()
            for file in target.files:
                _drop_pages(file)
            time.sleep(QUIET_SECONDS)
            before, started = _bytes_from_disk(), time.perf_counter()
            target.read(number)
            seconds[target.name].append(time.perf_counter() - started)
            disk[target.name] += _bytes_from_disk() - before
    mapped = statistics.median(seconds["numpy_memmap"])
    return [
        {
            "reader": target.name,
            "microseconds": statistics.median(seconds[target.name]) * 1e6,
            "disk_bytes": disk[target.name] // settings.cold_reads,
            "times_as_fast_as_mmap": mapped / statistics.median(seconds[target.name]),
        }
        for target in targets
    ]


def _cold_store(preset: str, store: TokenStore, length: int) -> _ColdFile:
    """Random windows through the store's reader; its shard indexes stay in memory, as in training."""
    parts = [part for part in store.parts(SOURCE, "train") if part.num_tokens > length]
    random = np.random.default_rng(2)

    def read(_: int) -> object:
        part = parts[int(random.integers(len(parts)))]
        first = int(random.integers((part.num_tokens - 1) // length)) * length
        return store.read_tokens(part, first, first + length + 1)

    # Opens every part once, which reads its shard index into memory.
    for part in parts:
        store.read_tokens(part, 0, 1)
    files = tuple(sorted(file for part in parts for file in (store.path / part.path / "tokens" / "c").iterdir()))
    return _ColdFile(f"amfm {preset}", files, read, lambda: None)


def _cold_mmap(flat: Path, dtype: str, length: int) -> _ColdFile:
    """Random windows of a copy: pages that another reader of the benchmark has mapped could not be dropped."""
    file = flat.with_name("cold.bin")
    shutil.copyfile(flat, file)
    tokens = np.memmap(file, dtype=dtype, mode="r")
    random = np.random.default_rng(2)
    mapping: mmap.mmap = tokens._mmap  # type: ignore[attr-defined]

    def read(_: int) -> object:
        first = int(random.integers((len(tokens) - 1) // length)) * length
        return np.array(tokens[first : first + length + 1])

    return _ColdFile("numpy_memmap", (file,), read, lambda: mapping.madvise(mmap.MADV_DONTNEED))


def _drop_pages(file: Path) -> None:
    """Drop a file's clean pages from the page cache."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _bytes_from_disk() -> int:
    """Bytes that this process made the system read from storage so far."""
    for line in Path("/proc/self/io").read_text().splitlines():
        if line.startswith("read_bytes:"):
            return int(line.split()[1])
    return 0
