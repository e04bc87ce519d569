"""Tokenizers of an export: our ids and texts, as transformers reads them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from amfm.data_pipeline.config import TokenizerConfig
from amfm.data_pipeline.tokenizer.sentencepiece_model import SCORE_STEP, read_sentencepiece_model, train_tokenizer
from amfm.data_pipeline.tokenizer.tokenizer import read_tokenizer_file
from amfm.pretrain.export.export import ODD_TEXTS
from amfm.pretrain.export.tokenizer import write_tokenizer
from tests.helpers.tiny_store import make_text


def sample_text() -> str:
    return make_text(np.random.default_rng(5), 40)


@pytest.mark.parametrize("algorithm", ["unigram", "bpe"])
def test_auto_tokenizer_gives_our_ids_and_text_back(algorithm: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    text = sample_text() * 30 + "\n".join(["### A heading", "----", "it was 1999, ha ha ha!  (two  spaces)"] * 40)
    tokenizer = train_tokenizer([text], TokenizerConfig(vocab_size=300, algorithm=algorithm))
    write_tokenizer(tokenizer, tmp_path, max_length=128)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for sample in (*ODD_TEXTS, text, text.replace(" ", "  ").upper(), "#" * 99 + "-" * 50, "\u2581 \u2581\u2581"):
        ids = tokenizer.encode(sample)
        assert theirs(sample, split_special_tokens=True)["input_ids"] == ids, sample[:40]
        if "\u2581" not in sample:
            assert theirs.decode(ids) == sample == tokenizer.decode(ids)
    assert theirs.eos_token_id == tokenizer.eos_id
    assert theirs.bos_token_id == tokenizer.bos_id
    assert theirs.pad_token_id == tokenizer.pad_id
    assert len(theirs) == tokenizer.vocab_size
    assert theirs("a" + theirs.eos_token)["input_ids"][-1] == tokenizer.eos_id, "a fine-tune would never learn to stop"


def test_scores_of_trained_tokenizers_are_exact_in_float32() -> None:
    tokenizer = train_tokenizer([sample_text() * 30], TokenizerConfig(vocab_size=300))
    pieces = read_sentencepiece_model(tokenizer.to_bytes()).pieces
    assert len(pieces) == 300
    assert all((piece.score / SCORE_STEP).is_integer() for piece in pieces)


def test_a_given_tokenizer_json_loses_only_what_adds_tokens(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import AutoTokenizer

    given = Tokenizer(models.BPE())
    given.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    given.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<end>"], initial_alphabet=alphabet)
    given.train_from_iterator([sample_text()], trainer)
    given.post_processor = processors.TemplateProcessing(single="<end> $A", special_tokens=[("<end>", 0)])
    given.enable_truncation(5)
    given.save(str(tmp_path / "given.json"))
    ours = read_tokenizer_file(tmp_path / "given.json", "<end>")
    (tmp_path / "out").mkdir()
    write_tokenizer(ours, tmp_path / "out", max_length=128)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    for sample in (*ODD_TEXTS, sample_text(), "an <end> written out"):
        ids = ours.encode(sample)
        assert theirs(sample, split_special_tokens=True)["input_ids"] == ids, sample
        assert theirs.decode(ids) == sample == ours.decode(ids)
    assert theirs.eos_token == "<end>"
    assert read_tokenizer_file(tmp_path / "out" / "amfm_tokenizer.json", 0).identity() == ours.identity()
