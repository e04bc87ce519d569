"""Hugging Face tokenizer.json files; tiktoken vocabularies come through their conversion to this format."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from amfm.data_pipeline.durable.json_files import read_object

if TYPE_CHECKING:
    import tokenizers


Ids = npt.NDArray[np.int32]
Offsets = npt.NDArray[np.int64]


class HuggingFaceTokenizer:
    """A tokenizer.json with the id of its end-of-text token, which the file itself does not name.

    Special tokens written out in a text are encoded as plain text: a document cannot end itself. Nothing is added in
    front or after, and truncation or padding that the file asks for is off.
    """

    kind = "huggingface"
    file_name = "tokenizer.json"

    def __init__(self, content: bytes, eos_id: int) -> None:
        self._content, self._eos_id = content, eos_id
        self._tokenizer = parse_tokenizer(content)
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # Ids may have holes, so the number of entries is not the range of ids.
        self._vocab_size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())
        if not 0 <= eos_id < self._vocab_size:
            raise ValueError(f"end-of-text id {eos_id} must be in range({self._vocab_size}), the vocabulary")

    def __reduce__(self) -> tuple[type[HuggingFaceTokenizer], tuple[bytes, int]]:
        return HuggingFaceTokenizer, (self._content, self._eos_id)

    @property
    def vocab_size(self) -> int:
        """One more than the largest id, added tokens included."""
        return self._vocab_size

    @property
    def bos_id(self) -> int | None:
        """Not named by the file, and never inserted."""
        return None

    @property
    def eos_id(self) -> int:
        """End-of-text id."""
        return self._eos_id

    @property
    def pad_id(self) -> int | None:
        """Not named by the file: rows are filled with the end token."""
        return None

    def encode(self, text: str) -> list[int]:
        """Encode one text to ids."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def encode_documents(self, texts: Sequence[str]) -> tuple[Ids, Offsets]:
        """Encode texts: ids one after another, each text ending in one end token, and the offset after each.

        The library uses its own threads unless TOKENIZERS_PARALLELISM is false.
        """
        end = np.array([self._eos_id], dtype=np.int32)
        pieces: list[npt.NDArray[np.int32]] = []
        lengths: list[int] = []
        # The fast variant leaves out offsets, which nothing here reads.
        for item in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False):
            ids = np.array(item.ids, dtype=np.int32)
            ended = (ids,) if len(ids) and ids[-1] == self._eos_id else (ids, end)
            pieces += ended
            lengths.append(sum(map(len, ended)))
        return np.concatenate(pieces), np.cumsum(lengths, dtype=np.int64)

    def control_tokens(self) -> dict[str, int]:
        """Ids of special tokens, by their text."""
        added = self._tokenizer.get_added_tokens_decoder()
        return {token.content: index for index, token in added.items() if token.special}

    def find_token(self, text: str) -> int | None:
        """Id of a token of this text, special or not; None where there is none."""
        index: int | None = self._tokenizer.token_to_id(text)
        return index

    def encode_spans(
        self, text: str, spans: Sequence[tuple[int, int]], *, has_control_tokens: bool
    ) -> tuple[list[int], list[bool]]:
        """Ids of a text without an end token, and which of them begin in one of the spans of characters, which rise.

        has_control_tokens: special tokens that are written out are tokens, as a chat template means them.
        """
        self._tokenizer.encode_special_tokens = not has_control_tokens
        try:
            encoded = self._tokenizer.encode(text, add_special_tokens=False)
        finally:
            self._tokenizer.encode_special_tokens = True
        begins, before = [], 0
        for start, stop in encoded.offsets:  # of a token that is all space an empty range after it
            begins.append(start if start < stop else before)
            before = stop
        edges = np.array(spans, np.int64).reshape(-1)
        return list(encoded.ids), (np.searchsorted(edges, begins, side="right") % 2 == 1).tolist()

    def decode(self, ids: Sequence[int]) -> str:
        """Decode ids to text; special tokens give nothing. ValueError for an id outside the vocabulary."""
        outside = [index for index in ids if not 0 <= index < self._vocab_size]
        if outside:
            raise ValueError(f"token id {outside[0]} must be in range({self._vocab_size}), the tokenizer's vocabulary")
        return str(self._tokenizer.decode([int(index) for index in ids], skip_special_tokens=True))

    def identity(self) -> str:
        """SHA-256 of the file and the end-of-text id."""
        return hashlib.sha256(f"huggingface\0{self._eos_id}\0".encode() + self._content).hexdigest()

    def to_bytes(self) -> bytes:
        """Content of the tokenizer.json."""
        return self._content


def parse_tokenizer(content: bytes) -> tokenizers.Tokenizer:
    """Build a tokenizer from the content of a tokenizer.json; ValueError where it is none."""
    import tokenizers  # here: a run on a store with a SentencePiece model never needs it

    try:
        return tokenizers.Tokenizer.from_buffer(content)
    except BaseException as error:
        # The library panics on some broken files: an exception that `except Exception` lets pass, of a class that
        # nothing exports.
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"the tokenizers library cannot read it: {error}") from error


def read_tokenizer_json(path: Path, eos: str | int | None) -> HuggingFaceTokenizer:
    """Load a tokenizer.json; `eos` is the end-of-text token or its id, else tokenizer_config.json next to it names it.

    ValueError when the file is not a tokenizer, or the end-of-text token is unknown or not in the vocabulary.
    """
    content = path.read_bytes()
    try:
        vocabulary = parse_tokenizer(content).get_vocab(with_added_tokens=True)
    except ValueError as error:
        cause = "" if "Cannot instantiate" in str(error) else f" ({error})"
        raise ValueError(f"{path} is not a tokenizer.json{cause}; name a file of the tokenizers library") from error
    if isinstance(eos, int):
        return HuggingFaceTokenizer(content, eos)
    token = eos or _configured_eos(path.with_name("tokenizer_config.json"))
    if token is None:
        raise ValueError(
            f"{path} does not name its end-of-text token; set data.tokenizer.eos_token, or put tokenizer_config.json "
            "with an eos_token next to it"
        )
    if token not in vocabulary:
        raise ValueError(f"data.tokenizer.eos_token={token!r} must be a token of {path}; correct it")
    return HuggingFaceTokenizer(content, vocabulary[token])


def _configured_eos(path: Path) -> str | None:
    """Read eos_token of a tokenizer_config.json, where it is a string or an object with `content`; None without one."""
    if not path.is_file():
        return None
    token = read_object(path).get("eos_token")
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None
