"""Sources of token ids without a tokenizer: the vocabulary is the model's, and what needs text is one message."""

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from amfm.data_pipeline.config import DataConfig, PrepareConfig, SourceConfig, TokenizerConfig
from amfm.data_pipeline.prepare.prepare import prepare
from amfm.data_pipeline.store.store import TokenStore
from amfm.data_pipeline.tokenizer.tokenizer import (
    keep_tokenizer,
    load_tokenizer,
    read_kept_tokenizer,
    read_tokenizer_file,
)
from amfm.data_pipeline.verify import sample_text, verify_store
from tests.helpers.tiny_store import run_in_process

END = 7


def write_dataset(folder, name="web", end=END, number=40):
    random = np.random.default_rng(0)
    builder = IndexedDatasetBuilder(str(folder / f"{name}.bin"), dtype=np.int32)
    for _ in range(number):
        document = [*random.integers(8, 500, size=random.integers(1, 60)).tolist(), *([] if end is None else [end])]
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(str(folder / f"{name}.idx"))
    return folder / name


def of_ids(folder, *paths, **tokenizer):
    return DataConfig(
        store=str(folder / "store"),
        sources=tuple(SourceConfig(name=f"s{number}", paths=(str(path),)) for number, path in enumerate(paths)),
        tokenizer=TokenizerConfig(**tokenizer),
        prepare=PrepareConfig(chunk_tokens=64),
        validation_fraction=0.1,
        num_workers=0,
    )


def prepare_here(config, vocab_size=512):
    return prepare(config, vocab_size=vocab_size, runner=run_in_process)


def test_a_prefix_alone_becomes_a_store_of_the_models_vocabulary(tmp_path):
    config = of_ids(tmp_path, write_dataset(tmp_path))
    assert prepare_here(config).units_written > 0 and prepare_here(config).units_written == 0
    store = TokenStore.open(config.store)
    assert (store.vocab_size, store.eos_id) == (512, END) and verify_store(config.store) == []
    sample = sample_text(config, 0, sequence_length=32, seed=0)
    assert " ".join(sample.documents).split() == [str(token) for token in sample.tokens]
    tokenizer = load_tokenizer(config.store)
    keep_tokenizer(tokenizer, tmp_path / "kept")
    assert read_kept_tokenizer(tmp_path / "kept") == tokenizer
    for call in (
        lambda: tokenizer.encode("a"),
        lambda: tokenizer.decode([1]),
        lambda: tokenizer.encode_documents(["a"]),
    ):
        with pytest.raises(
            ValueError, match=r"prepared from token ids without a tokenizer; prepare it again, as another"
        ):
            call()
    with pytest.raises(ValueError, match=r"data.tokenizer is a file \(tokenizer .*\), but the store"):
        prepare_here(config, vocab_size=1024)


def test_an_end_token_that_is_given_is_put_where_documents_lack_it(tmp_path):
    config = of_ids(tmp_path, write_dataset(tmp_path, end=None), eos_token=3)
    prepare_here(config)
    assert TokenStore.open(config.store).eos_id == 3 and verify_store(config.store) == []


def test_ids_of_nanogpt_are_cut_at_the_end_token_that_is_given(tmp_path):
    np.array([9, 8, END, 10, 11, 12, END], np.uint16).tofile(tmp_path / "nano.bin")
    config = of_ids(tmp_path, tmp_path / "nano.bin", eos_token=END).model_copy(update={"validation_fraction": 0.0})
    assert prepare_here(config).documents["s0"]["train"] == 2


@pytest.mark.parametrize(
    ("end", "tokenizer", "message"),
    [
        (
            None,
            {},
            r"first 40 documents of the sources end with \d+, \d+, \d+, \d+; give its id in data.tokenizer.eos_token",
        ),
        (END, {"eos_token": 512}, r"eos_token=512 must be an id below model.vocab_size=512"),
        (END, {"eos_token": "</s>"}, r"eos_token='</s>' must be an id below model.vocab_size=512"),
    ],
)
def test_an_end_token_that_is_not_known_is_refused(tmp_path, end, tokenizer, message):
    with pytest.raises(ValueError, match=message):
        prepare_here(of_ids(tmp_path, write_dataset(tmp_path, end=end), **tokenizer))


def test_ids_next_to_text_and_ids_beyond_the_model_are_refused(tmp_path):
    prefix, text = write_dataset(tmp_path), tmp_path / "a.txt"
    text.write_text("a text")
    with pytest.raises(ValueError, match=r"source 's0' holds tokens, .* or give only sources of tokens"):
        prepare_here(of_ids(tmp_path, prefix, text))
    with pytest.raises(ValueError, match=r"vocabulary is 400 .*, or without one a model.vocab_size above it"):
        prepare_here(of_ids(tmp_path, prefix), vocab_size=400)
    with pytest.raises(ValueError, match=r"eos_token=3 .* of sources of token ids|text was asked for"):
        prepare_here(of_ids(tmp_path / "text", text, eos_token=3))
    (tmp_path / "nano.bin").write_bytes(b"\1\0")
    with pytest.raises(ValueError, match=r"only the end token cuts documents; give its id in data.tokenizer.eos_token"):
        prepare_here(of_ids(tmp_path, tmp_path / "nano.bin"))
    for content in (
        b'{"vocab_size": 3}',
        b'{"vocab_size": 3, "eos_id": 3}',
        b"[" * 100_000,
        b'{"vocab_size": 1e999, "eos_id": 1}',
    ):
        (tmp_path / "tokenizer.ids").write_bytes(content)
        with pytest.raises(ValueError, match=r"tokenizer.ids is damaged.*; restore it from a copy"):
            read_tokenizer_file(tmp_path / "tokenizer.ids")
