import pytest

from data_pipeline.config import TokenizerConfig
from data_pipeline.store import TokenStore
from data_pipeline.tokenizer import load_tokenizer, train_tokenizer
from tests.helpers.tiny_store import make_text, make_tiny_store

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
    import numpy as np

    random = np.random.default_rng(0)
    return [make_text(random, 60) for _ in range(100)]


@pytest.mark.parametrize("algorithm", ["unigram", "bpe"])
def test_decoding_gives_every_text_back(texts, algorithm):
    tokenizer = train_tokenizer(texts, TokenizerConfig(vocab_size=400, algorithm=algorithm))
    assert tokenizer.vocab_size == 400
    for text in [*HARD_TEXTS, *texts[:5]]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.eos_id not in ids, "control tokens written out in a text stay text"
    assert tokenizer.encode_batch(HARD_TEXTS) == [tokenizer.encode(text) for text in HARD_TEXTS]


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
    with pytest.raises(ValueError, match=r"x.model isn't a SentencePiece model"):
        load_tokenizer(tmp_path / "x.model")
    with pytest.raises(ValueError, match=r"doesn't exist; name a SentencePiece .model file"):
        load_tokenizer(tmp_path / "y.model")
    with pytest.raises(ValueError, match="run `amfm prepare CONFIG` first"):
        load_tokenizer(tmp_path)
