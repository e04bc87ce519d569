"""Files that `python -m benchmarks.data` reads: one text as token stores of every preset and in the formats of the peers."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from amfm.data_pipeline.config import DataConfig, PrepareConfig, SourceConfig, TokenizerConfig
from amfm.data_pipeline.samples.packing import count_windows
from amfm.data_pipeline.store.manifest import write_manifest
from amfm.data_pipeline.store.megatron_files import export_megatron
from amfm.data_pipeline.store.part_writer import write_part
from amfm.data_pipeline.store.store import TokenStore

SOURCE = "text"
PRESETS = ("fast", "balanced", "small")
HUGE_PART_TOKENS = 16_000_000  # what the default part_bytes of 64 MB of text gives


@dataclass(frozen=True)
class BenchData:
    """Settings of the benchmark. `text`: files or folders as in data.sources. `work`: folder of everything it makes.

    `samples`: read by each reader in a round. `batch`: sequences of a micro-batch. `huge_tokens`: size of the store whose
    first batch is timed. Stores in `work` are found again by later runs.
    """

    work: Path
    text: tuple[str, ...]
    sequence_length: int = 4096
    batch: int = 8
    samples: int = 512
    rounds: int = 7
    cold_reads: int = 100
    vocab_size: int = 32_000
    part_bytes: int = PrepareConfig().part_bytes
    actors: int = 1
    huge_tokens: int = 10**12

    def data_config(self, name: str) -> DataConfig:
        """Configuration that prepares or reads the store `name`; all text trains, none validates."""
        model = self.work / "tokenizer.model"
        return DataConfig(
            store=str(self.work / name),
            sources=(SourceConfig(name=SOURCE, paths=self.text),),
            tokenizer=TokenizerConfig(model=str(model) if model.exists() else None, vocab_size=self.vocab_size),
            prepare=PrepareConfig(num_actors=self.actors, part_bytes=self.part_bytes),
            validation_fraction=0.0,
            num_workers=0,
        )


def recode_store(store: TokenStore, folder: Path, preset: str) -> TokenStore:
    """Write the same parts with the compression of another preset; returns the new store."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    layout = replace(store.layout, preset=preset)
    parts = [
        write_part(
            folder,
            part.path,
            store.read_tokens(part, 0, part.num_tokens),
            store.document_ends(part).astype(np.uint64),
            text_bytes=part.text_bytes,
            layout=layout,
            attributes={"format": "amfm token part", "version": 2},
        )
        for part in store.parts(SOURCE, "train")
    ]
    shutil.copy(store.tokenizer_path, folder / store.tokenizer.file)
    write_manifest(folder, store.tokenizer, layout, {SOURCE: {"train": parts, "validation": []}})
    return TokenStore.open(folder)


def make_huge_store(store: TokenStore, folder: Path, num_tokens: int) -> int:
    """Write a manifest of `num_tokens` tokens whose records all name one real part; returns the number of records.

    The loader's cost to open a store depends on its records, so one part of up to 16M tokens stands for all.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    tokens, ends = _joined(store, HUGE_PART_TOKENS)
    part = write_part(
        folder,
        f"parts/{SOURCE}/train-000000-00.zarr",
        tokens,
        ends,
        text_bytes=4 * len(tokens),
        layout=store.layout,
        attributes={"format": "amfm token part", "version": 2},
    )
    count = -(-num_tokens // len(tokens))
    shutil.copy(store.tokenizer_path, folder / store.tokenizer.file)
    write_manifest(folder, store.tokenizer, store.layout, {SOURCE: {"train": [part] * count, "validation": []}})
    return count


def _joined(store: TokenStore, limit: int) -> tuple[npt.NDArray[np.generic], npt.NDArray[np.uint64]]:
    """First tokens of the store as one array, and its document ends (uint64, exclusive)."""
    pieces, ends, total = [], [np.zeros(0, np.int64)], 0
    for part in store.parts(SOURCE, "train"):
        pieces.append(store.read_tokens(part, 0, part.num_tokens))
        ends.append(store.document_ends(part) + total)
        total += part.num_tokens
        if total >= limit:
            break
    size = min(total, limit)
    joined = np.concatenate(ends)
    return np.concatenate(pieces)[:size], np.append(joined[joined < size], size).astype(np.uint64)


def export_for_megatron(store: TokenStore, prefix: Path) -> int:
    """Write PREFIX.bin and PREFIX.idx; returns their bytes.

    Megatron's cache for the prefix is removed, as it would not notice that the text changed.
    """
    shutil.rmtree(megatron_cache(prefix), ignore_errors=True)
    export_megatron(store, SOURCE, "train", prefix)
    return sum(prefix.with_suffix(suffix).stat().st_size for suffix in (".bin", ".idx"))


def megatron_cache(prefix: Path) -> Path:
    """Folder in which GPTDataset keeps its indices, named by prefix and settings, not by the text."""
    return prefix.with_name(f"{prefix.name}_cache")


def windows(store: TokenStore, sequence_length: int) -> Iterator[npt.NDArray[np.generic]]:
    """All windows of sequence_length + 1 tokens, part by part: what formats without documents store."""
    for part in store.parts(SOURCE, "train"):
        tokens = store.read_tokens(part, 0, part.num_tokens)
        for number in range(count_windows(part.num_tokens, sequence_length)):
            yield tokens[number * sequence_length : (number + 1) * sequence_length + 1]


def bytes_below(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
