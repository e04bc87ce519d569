import base64

import numpy as np
import pytest
import tiktoken
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from amfm.data_pipeline.tokenizer.tiktoken import convert_tiktoken
from amfm.data_pipeline.tokenizer.tokenizer import read_tokenizer_file
from tests.helpers.tiny_store import make_text

PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
SPECIAL = {"<|endoftext|>": 1011, "<|pad|>": 1013}  # with holes, as published vocabularies have


@pytest.fixture(scope="module")
def ranks():
    """A vocabulary of 1,000 tokens learned by another library, in the order of its ids."""
    random = np.random.default_rng(0)
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    learner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1000, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    learner.train_from_iterator([make_text(random, 300) + "it's 1234  naïve 漢字\n\n" for _ in range(50)], trainer)
    texts = sorted(learner.get_vocab().items(), key=lambda item: item[1])
    letters = {letter: number for number, letter in enumerate(make_letters())}
    return {bytes(letters[letter] for letter in text): index for text, index in texts}


def make_letters():
    """Byte-level letters as the library itself has them: each byte encoded alone."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), key=ord)
    printable = [letter for letter in alphabet if ord(letter) < 0x100]
    others = iter([letter for letter in alphabet if ord(letter) >= 0x100])
    return [chr(byte) if chr(byte) in printable else next(others) for byte in range(256)]


@pytest.fixture()
def file(ranks, tmp_path):
    path = tmp_path / "small.tiktoken"
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()))
    return path


def test_ids_are_those_of_tiktoken(file, ranks, tmp_path):
    reference = tiktoken.Encoding("small", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=SPECIAL)
    target = tmp_path / "tokenizer.json"
    target.write_bytes(convert_tiktoken(file, pattern=PATTERN, special_tokens=SPECIAL))
    tokenizer = read_tokenizer_file(target, "<|endoftext|>")
    random = np.random.default_rng(1)
    texts = [
        make_text(random, 200),
        "",
        " ",
        "\n\n \t x",
        "don't WON'T  12345",
        "naïve 漢字 🙂\u200d",
        "<|endoftext|> stays",
    ]
    texts += [bytes(random.integers(0, 256, 50).astype(np.uint8)).decode("utf-8", "replace") for _ in range(20)]
    texts += ["a" * 37, "  " * 19 + "x", "\r\n" * 9]
    for text in texts:
        ids = reference.encode_ordinary(text)
        assert tokenizer.encode(text) == ids and tokenizer.decode(ids) == text
    assert (tokenizer.eos_id, tokenizer.vocab_size) == (1011, 1014)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"IQ== 0\nbroken\n", "line 2 is not `base64 rank`"),
        (b"", "has 0 tokens of 0 ranks"),
        (b"IQ== 0\nIg== 0\n", "has 2 tokens of 1 ranks"),
        (b"IQ== 0\n", "has no token for byte 0"),
    ],
)
def test_a_broken_file_is_refused(tmp_path, content, message):
    (tmp_path / "x.tiktoken").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        convert_tiktoken(tmp_path / "x.tiktoken", pattern=PATTERN, special_tokens={})


def test_a_special_token_that_clashes_and_a_broken_pattern_are_refused(file):
    with pytest.raises(ValueError, match=r"special token '<e>' has id 5, which is a token of"):
        convert_tiktoken(file, pattern=PATTERN, special_tokens={"<e>": 5})
    with pytest.raises(ValueError, match=r"with pattern '\(' gives no tokenizer"):
        convert_tiktoken(file, pattern="(", special_tokens=SPECIAL)
