"""A valid small token store without Ray: the same plan, writer and manifest, run in this process in about a second."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from amfm.data_pipeline.config import DataConfig, PrepareConfig, SourceConfig, TokenizerConfig
from amfm.data_pipeline.prepare.plan import Unit
from amfm.data_pipeline.prepare.prepare import prepare
from amfm.data_pipeline.prepare.unit import UnitFailure, UnitReport, run_unit
from amfm.data_pipeline.tokenizer.tokenizer import Tokenizer

LETTERS = tuple("abcdefghijklmnopqrstuvwxyz")
NUM_WORDS = 199  # prime, so that the successor rule below visits all words


def run_in_process(
    units: Sequence[Unit], store: Path, tokenizer: Tokenizer, config: DataConfig
) -> Iterator[tuple[Unit, UnitReport | UnitFailure]]:
    """Stand where the Ray actors stand: the same function writes the same bytes."""
    for unit in units:
        yield unit, run_unit(unit, store, tokenizer)


@cache
def _make_words() -> list[str]:
    spelling = np.random.default_rng(7)
    return ["".join(spelling.choice(LETTERS, size=2 + number % 7)) for number in range(NUM_WORDS)]


def make_text(random: np.random.Generator, num_words: int) -> str:
    """Sentences of made-up words whose successors are far from uniform, so that a model can learn something."""
    words = _make_words()
    out, at = [], int(random.integers(NUM_WORDS))
    for number in range(num_words):
        out.append(words[at] + ("." if number % 9 == 8 else ""))
        at = (at * 7 + 3) % NUM_WORDS if random.random() < 0.7 else int(random.integers(NUM_WORDS))
    return " ".join(out) + "\n"


def write_jsonl(path: Path, num_documents: int, *, seed: int, mean_words: int = 60) -> Path:
    """Write made-up documents of very different lengths."""
    random = np.random.default_rng(seed)
    lengths = 1 + random.geometric(1 / mean_words, size=num_documents)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": make_text(random, int(n))}) + "\n" for n in lengths))
    return path


def make_tiny_store(
    folder: str | Path,
    *,
    num_documents: int = 300,
    mean_words: int = 60,
    vocab_size: int = 400,
    seed: int = 0,
    num_sources: int = 1,
    part_bytes: int = 40_000,
    preset: str = "fast",
    **data_settings: Any,
) -> DataConfig:
    """Make texts and a prepared store in a folder and return the DataConfig that reads it.

    The default store has about 300 documents, 30,000 tokens, a few parts, and a tenth of the documents for
    validation; it is read in the calling process (num_workers=0). data_settings: other fields of DataConfig.
    """
    folder = Path(folder)
    sources = tuple(
        SourceConfig(
            name=f"source{number}",
            paths=(
                str(
                    write_jsonl(
                        folder / f"text{number}.jsonl", num_documents, seed=seed + 1000 * number, mean_words=mean_words
                    )
                ),
            ),
            weight=1.0 + number,
        )
        for number in range(num_sources)
    )
    settings: dict[str, Any] = {
        "store": str(folder / "store"),
        "sources": sources,
        "tokenizer": TokenizerConfig(vocab_size=vocab_size, algorithm="bpe"),
        "prepare": PrepareConfig(part_bytes=part_bytes, chunk_tokens=512, preset=preset, seed=seed),
        "validation_fraction": 0.1,
        "num_workers": 0,
    }
    config = DataConfig(**(settings | data_settings))
    prepare(config, runner=run_in_process)
    return config
