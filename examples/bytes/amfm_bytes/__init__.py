"""The bytes of a text as tokens (as in ByT5, Xue et al. 2022, arXiv 2105.13626), and one token that ends it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

END = 256


class ByteTokenizer:
    """Ids 0 to 255 are bytes of UTF-8, 256 is the end. The file has no content of its own; it is a name for these ids."""

    kind, file_name = "bytes", "tokenizer.bytes"
    vocab_size, bos_id, eos_id, pad_id = END + 1, None, END, None

    def __init__(self, content: bytes) -> None:
        self.content = content

    def encode(self, text: str) -> list[int]:
        """Bytes of a text."""
        return list(text.encode())

    def encode_documents(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Bytes of all texts one after another, an end after each, and the offset after each."""
        encoded = [np.append(np.frombuffer(text.encode(), np.uint8).astype(np.int32), np.int32(END)) for text in texts]
        return np.concatenate(encoded), np.cumsum([len(ids) for ids in encoded], dtype=np.int64)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of bytes; ends give nothing, and what is cut inside a character gives U+FFFD."""
        return bytes(index for index in ids if index != END).decode(errors="replace")

    def identity(self) -> str:
        """Hash of what defines the ids."""
        return hashlib.sha256(b"bytes 1").hexdigest()

    def to_bytes(self) -> bytes:
        """Content of the file."""
        return self.content

    def to_tokenizer_json(self) -> bytes:
        """The same ids for transformers: byte-level BPE without merges, whose letters for bytes are those of GPT-2."""
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [byte for byte in range(256) if byte not in printable]
        letters = {chr(byte): byte for byte in printable} | {
            chr(256 + place): byte for place, byte in enumerate(others)
        }
        fast = tokenizers.Tokenizer(models.BPE(vocab=letters, merges=[]))
        fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        fast.decoder = decoders.ByteLevel()
        fast.add_special_tokens(["<end>"])
        return fast.to_str().encode()
