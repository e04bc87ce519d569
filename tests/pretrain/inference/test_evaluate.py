"""Evaluation predicts every token of the part once, each document on its own, and knows whose text it may read."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from amfm.data_pipeline.config import DataConfig
from amfm.data_pipeline.store.store import TokenStore
from amfm.data_pipeline.tokenizer.tokenizer import load_tokenizer
from amfm.model.packing import PackMeta
from amfm.pretrain.inference.evaluate import evaluate_checkpoint
from amfm.pretrain.inference.weights import read_weights, write_weights
from tests.helpers.tiny_store import make_tiny_store
from tests.pretrain.export.exported_models import random_weights, weights_folder
from tests.pretrain.tiny_run import MODEL


def documents_of(store_path: str, split: str) -> list[list[int]]:
    store = TokenStore.open(store_path)
    documents = []
    for name in store.source_names:
        for part in store.parts(name, split):
            start = 0
            for end in store.document_ends(part).tolist():
                documents.append(store.read_tokens(part, start, end).tolist())
                start = end
    store.close()
    return documents


def test_the_loss_is_the_mean_over_all_tokens_of_documents_read_by_themselves(data: DataConfig, tmp_path: Path) -> None:
    folder = weights_folder(data, tmp_path / "weights", "own")
    evaluation = evaluate_checkpoint(folder, store=data.store, sequence_length=100_000)
    model = read_weights(folder).build().double()
    nll, tokens = 0.0, 0
    for document in documents_of(data.store, "validation"):
        ids_BT = torch.tensor([document])
        with torch.no_grad():
            logits_BTV = model(ids_BT, PackMeta.one_document_a_row(1, len(document))).logits_BTV
        chosen = logits_BTV[0, :-1].log_softmax(-1).gather(1, ids_BT[0, 1:, None])
        nll, tokens = nll - float(chosen.sum()), tokens + len(document) - 1
    assert evaluation.tokens == tokens
    # float32 against float64, averaged over a thousand tokens.
    assert evaluation.loss == pytest.approx(nll / tokens, rel=1e-5)
    assert evaluation.perplexity == pytest.approx(2.718281828459045**evaluation.loss)


def test_shorter_rows_predict_the_same_tokens_with_less_context(data: DataConfig, tmp_path: Path) -> None:
    folder = tmp_path / "weights"
    folder.mkdir()
    write_weights(folder, random_weights(data, MODEL | {"pattern": "*-", "moe": None}))
    whole = evaluate_checkpoint(folder, store=data.store, sequence_length=100_000)
    seen: list[tuple[int, int]] = []
    rows = evaluate_checkpoint(
        folder, store=data.store, sequence_length=23, rows_at_once=3, progress=lambda *now: seen.append(now)
    )
    assert rows.tokens == whole.tokens
    assert rows.loss != whole.loss
    assert seen[-1][0] == rows.tokens <= seen[-1][1]
    same = evaluate_checkpoint(folder, store=data.store, sequence_length=23, rows_at_once=1)
    assert same.loss == pytest.approx(rows.loss, rel=1e-6)


def test_each_source_is_measured_and_gets_its_share_of_a_limit(tmp_path: Path) -> None:
    data = make_tiny_store(tmp_path / "data", num_documents=60, mean_words=15, num_sources=2)
    folder = weights_folder(data, tmp_path / "weights", "nemotron_h")
    full = evaluate_checkpoint(folder, store=data.store, sequence_length=16)
    assert set(full.by_source) == {"source0", "source1"}
    assert sum(source.tokens for source in full.by_source.values()) == full.tokens
    mean = sum(source.loss * source.tokens for source in full.by_source.values()) / full.tokens
    assert full.loss == pytest.approx(mean)
    # The text itself, counted by hand, over the tokens that stand for it.
    store, tokenizer = TokenStore.open(data.store), load_tokenizer(data.store)
    for name, source in full.by_source.items():
        parts = store.parts(name, "validation")
        ids = [store.read_tokens(part, 0, part.num_tokens).tolist() for part in parts]
        num_bytes = sum(len(tokenizer.decode([i for i in part if i != store.eos_id]).encode()) for part in ids)
        bits = source.loss / math.log(2) * sum(map(len, ids)) / num_bytes
        assert source.bits_per_byte == pytest.approx(bits, rel=0.02), "the decoder joins documents without their ends"
    assert full.bits_per_byte is not None
    assert min(s.bits_per_byte or 0 for s in full.by_source.values()) <= full.bits_per_byte
    part = evaluate_checkpoint(
        folder, store=data.store, sequence_length=16, rows_at_once=1, max_tokens=full.tokens // 3
    )
    assert set(part.by_source) == {"source0", "source1"}
    assert part.tokens < full.tokens / 2


def test_foreign_text_and_missing_parts_are_refused(data: DataConfig, tmp_path: Path) -> None:
    folder = weights_folder(data, tmp_path / "weights", "nemotron_h")
    with pytest.raises(ValueError, match="an imported model and knows no text; name a store"):
        evaluate_checkpoint(folder)
    with pytest.raises(ValueError, match="split='test' must be one of train, validation"):
        evaluate_checkpoint(folder, store=data.store, split="test")
    other = make_tiny_store(tmp_path / "other", num_documents=60, seed=5, validation_fraction=0.0)
    with pytest.raises(ValueError, match="was made with tokenizer"):
        evaluate_checkpoint(folder, store=other.store)
    foreign = weights_folder(other, tmp_path / "foreign", "nemotron_h")
    with pytest.raises(ValueError, match="has no tokens to predict"):
        evaluate_checkpoint(foreign, store=other.store)
