import json
import pickle
from itertools import pairwise

import numpy as np
import pytest

from amfm.data_pipeline.config import TokenizerConfig
from amfm.data_pipeline.prepare.prepare import prepare
from amfm.data_pipeline.store.store import TokenStore
from amfm.data_pipeline.tokenizer.sentencepiece_model import train_tokenizer
from amfm.data_pipeline.tokenizer.tokenizer import load_tokenizer, read_tokenizer_file
from tests.helpers.tiny_store import make_text, make_tiny_store, run_in_process

HARD_TEXTS = [
    "  two  spaces \n\n\ttab\r\n",
    "é 漢 🙂 \u200b",
    "<s> </s> <unk> <0x0A>",
    "",
    " ",
    "\n",
    "a\0b",
    "1234567",
]


@pytest.fixture(scope="module")
def texts():
    random = np.random.default_rng(0)
    return [make_text(random, 60) for _ in range(100)]


def documents_one_by_one(tokenizer, texts):
    return [[*tokenizer.encode(text), tokenizer.eos_id] for text in texts]


def documents_together(tokenizer, texts):
    ids, ends = tokenizer.encode_documents(texts)
    assert ids.dtype == np.int32 and ends.dtype == np.int64 and ends[-1] == len(ids)
    return [ids[start:stop].tolist() for start, stop in pairwise([0, *ends.tolist()])]


@pytest.mark.parametrize("algorithm", ["unigram", "bpe"])
def test_decoding_gives_every_text_back(texts, algorithm):
    tokenizer = train_tokenizer(texts, TokenizerConfig(vocab_size=400, algorithm=algorithm))
    assert tokenizer.vocab_size == 400
    for text in [*HARD_TEXTS, *texts[:5]]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.eos_id not in ids, "control tokens written out in a text stay text"
    many = [*HARD_TEXTS, "\n".join(texts[:30]), "\n\n" + "\n".join(texts) + "\n"]
    assert documents_together(tokenizer, many) == documents_one_by_one(tokenizer, many)


def test_training_again_gives_the_same_bytes(texts):
    first, second = (train_tokenizer(texts, TokenizerConfig(vocab_size=400)) for _ in range(2))
    assert first.to_bytes() == second.to_bytes() and first.identity() == second.identity()
    other = train_tokenizer(texts[1:], TokenizerConfig(vocab_size=400))
    assert other.identity() != first.identity()


def test_without_byte_fallback_newlines_still_survive(texts):
    tokenizer = train_tokenizer(texts, TokenizerConfig(vocab_size=300, byte_fallback=False, algorithm="bpe"))
    assert tokenizer.decode(tokenizer.encode(texts[0])) == texts[0]


def test_a_vocabulary_that_the_text_cannot_fill_is_refused(texts):
    with pytest.raises(ValueError, match=r"vocab_size=30000 must fit the training text .* set it to a value <= \d+\)"):
        train_tokenizer(texts, TokenizerConfig(vocab_size=30_000, algorithm="bpe"))
    with pytest.raises(ValueError, match="vocab_size=400 must fit the training text"):
        train_tokenizer([], TokenizerConfig(vocab_size=400))


def test_an_id_outside_the_vocabulary_is_refused(texts):
    tokenizer = train_tokenizer(texts, TokenizerConfig(vocab_size=400, algorithm="bpe"))
    for index in (400, -1):
        with pytest.raises(ValueError, match=rf"token id {index} must be in range\(400\)"):
            tokenizer.decode([5, index])


def test_a_store_gives_its_tokenizer_and_notices_another(tmp_path):
    config = make_tiny_store(tmp_path)
    store = TokenStore.open(config.store)
    tokenizer = load_tokenizer(config.store)
    assert tokenizer.identity() == store.tokenizer_identity == load_tokenizer(store.tokenizer_path).identity()
    other = train_tokenizer(
        ["other text " * 9, "and more of it " * 9], TokenizerConfig(vocab_size=300, algorithm="bpe")
    )
    store.tokenizer_path.write_bytes(other.to_bytes())
    with pytest.raises(
        RuntimeError,
        match=f"has identity {other.identity()}, but the store was written with {store.tokenizer_identity}",
    ):
        load_tokenizer(config.store)


def test_a_file_that_is_no_model_is_refused(tmp_path):
    (tmp_path / "x.model").write_text("no model")
    with pytest.raises(ValueError, match=r"x.model is not a SentencePiece model"):
        load_tokenizer(tmp_path / "x.model")
    with pytest.raises(ValueError, match=r"does not exist; name a SentencePiece .model file"):
        load_tokenizer(tmp_path / "y.model")
    with pytest.raises(ValueError, match="run `amfm prepare CONFIG` first"):
        load_tokenizer(tmp_path)


@pytest.fixture()
def tokenizer_json(tmp_path, texts):
    """A byte-level BPE as GPT-2 has, with holes in its ids and a template that adds tokens."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=600, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
        ),
    )
    made.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    made.enable_truncation(7)
    path = tmp_path / "tokenizer.json"
    made.save(str(path))
    return path


def test_a_tokenizer_json_gives_every_text_back_and_lets_no_text_end_itself(tokenizer_json, texts):
    tokenizer = read_tokenizer_file(tokenizer_json, "<|endoftext|>")
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (600, 0)
    for text in [*HARD_TEXTS, "a <|endoftext|> b", *texts[:5]]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and 0 not in ids
    assert documents_together(tokenizer, HARD_TEXTS) == documents_one_by_one(tokenizer, HARD_TEXTS)
    assert pickle.loads(pickle.dumps(tokenizer)).identity() == tokenizer.identity()


def test_the_end_token_of_a_tokenizer_json_must_be_known(tokenizer_json):
    with pytest.raises(ValueError, match=r"does not name its end-of-text token; set data.tokenizer.eos_token"):
        read_tokenizer_file(tokenizer_json)
    with pytest.raises(ValueError, match=r"eos_token='</s>' must be a token of"):
        read_tokenizer_file(tokenizer_json, "</s>")
    tokenizer_json.with_name("tokenizer_config.json").write_text('{"eos_token": {"content": "<|endoftext|>"}}')
    assert read_tokenizer_file(tokenizer_json).eos_id == 0
    tokenizer_json.write_text("{}")
    with pytest.raises(ValueError, match=r"is not a tokenizer.json"):
        read_tokenizer_file(tokenizer_json)


def test_a_store_is_prepared_with_a_tokenizer_json(tokenizer_json, tmp_path):
    given = TokenizerConfig(model=str(tokenizer_json), eos_token="<|endoftext|>")
    config = make_tiny_store(tmp_path / "made", tokenizer=given)
    store, tokenizer = TokenStore.open(config.store), load_tokenizer(config.store)
    assert store.tokenizer.kind == "huggingface" and store.eos_id == 0
    _, _, part = next(iter(store.all_parts()))
    ends = store.document_ends(part)
    first = tokenizer.decode(store.read_tokens(part, 0, int(ends[0]) - 1).tolist())
    assert json.dumps({"text": first}) in (tmp_path / "made" / "text0.jsonl").read_text()
    assert prepare(config, runner=run_in_process).units_written == 0
