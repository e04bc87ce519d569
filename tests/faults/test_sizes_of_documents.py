"""Documents of sizes that no one tries first: one of ten million tokens, a million of a few. Every token, once."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from amfm.data_pipeline.config import DataConfig, SourceConfig, TokenizerConfig
from amfm.data_pipeline.config import PrepareConfig as Prepare
from amfm.data_pipeline.prepare.prepare import prepare
from amfm.data_pipeline.store.store import TokenStore
from amfm.data_pipeline.tokenizer.tokenizer import load_tokenizer
from amfm.data_pipeline.verify import verify_store
from tests.data_pipeline.loader.loading import load
from tests.helpers.tiny_store import make_text, run_in_process

LONG_TOKENS, TINY_DOCUMENTS = 10**7, 10**6


def prepared(folder: Path, text: Path, **settings: float) -> DataConfig:
    config = DataConfig(
        store=str(folder / "store"),
        sources=(SourceConfig(name="a", paths=(str(text),)),),
        tokenizer=TokenizerConfig(vocab_size=300, algorithm="bpe", training_bytes=10**6),
        prepare=Prepare(part_bytes=4 << 20, chunk_tokens=4096, preset="fast", seed=0),
        num_workers=0,
        **settings,
    )
    prepare(config, runner=run_in_process)
    return config


def read_back(config: DataConfig) -> tuple[np.ndarray, np.ndarray]:
    """All tokens of the store, and the length of each document."""
    store = TokenStore.open(config.store)
    parts = store.parts("a", "train")
    tokens = np.concatenate([store.read_tokens(part, 0, part.num_tokens) for part in parts])
    lengths = np.concatenate([np.diff(store.document_ends(part), prepend=0) for part in parts])
    return tokens, lengths


@pytest.mark.slow
def test_a_document_of_ten_million_tokens_is_stored_whole_and_read_in_rows(tmp_path: Path) -> None:
    piece = make_text(np.random.default_rng(0), 20_000)
    (tmp_path / "long.txt").write_text(piece)
    config = prepared(tmp_path / "measure", tmp_path / "long.txt", validation_fraction=0.0)
    per_piece = TokenStore.open(config.store).num_tokens("a", "train")
    (tmp_path / "long.txt").write_text(piece * (LONG_TOKENS // per_piece + 1))
    config = prepared(tmp_path / "whole", tmp_path / "long.txt", validation_fraction=0.0)
    tokens, lengths = read_back(config)
    assert len(lengths) == 1 and lengths[0] >= LONG_TOKENS
    tokenizer = load_tokenizer(config.store)
    assert tokenizer.decode(tokens[-1000:-1].tolist()).split()[-50:] == piece.split()[-50:]
    assert (tokens == tokenizer.eos_id).sum() == 1 and tokens[-1] == tokenizer.eos_id
    assert verify_store(config.store) == []
    assert [batch.tokens_BT.shape for batch in load(config, sequence_length=2048).take(4)] == [(2, 2048)] * 2


@pytest.mark.slow
def test_a_million_documents_of_a_few_tokens_are_all_there(tmp_path: Path) -> None:
    words = [f'{{"text": "{number % 997:x}"}}\n' for number in range(TINY_DOCUMENTS)]
    (tmp_path / "tiny.jsonl").write_text("".join(words))
    config = prepared(tmp_path, tmp_path / "tiny.jsonl", validation_fraction=0.0)
    tokens, lengths = read_back(config)
    tokenizer = load_tokenizer(config.store)
    assert len(lengths) == TINY_DOCUMENTS and (tokens == tokenizer.eos_id).sum() == TINY_DOCUMENTS
    # Preparation mixes documents: each text must be there as often as it was given, in rows filled up with -1.
    starts, width = np.cumsum(lengths) - lengths, int(lengths.max())
    place = starts[:, None] + np.arange(width)
    rows = np.where(
        np.arange(width) < lengths[:, None] - 1, tokens[np.minimum(place, len(tokens) - 1)].astype(np.int64), -1
    )
    kinds, counts = np.unique(rows, axis=0, return_counts=True)
    found = {
        tokenizer.decode([index for index in kind.tolist() if index >= 0]): count for kind, count in zip(kinds, counts)
    }
    assert found == Counter(f"{number % 997:x}" for number in range(TINY_DOCUMENTS))
    assert verify_store(config.store) == []
    assert [batch.tokens_BT.shape for batch in load(config, sequence_length=2048).take(4)] == [(2, 2048)] * 2
