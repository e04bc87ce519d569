"""What a store knows of its vocabulary where sources give token ids and no tokenizer is given: its size and the end token.

It has the place of a tokenizer in a store, in a run directory and next to weights, and knows no text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NoReturn

from amfm.data_pipeline.tokenizer.huggingface import Ids, Offsets

NEEDS_TEXT = (
    "text was asked for, and the data was prepared from token ids without a tokenizer; prepare it again, as another store, with "
    "the file of the tokenizer in data.tokenizer.model"
)


@dataclass(frozen=True)
class IdVocabulary:
    """Ids below `vocab_size`, of which `eos_id` ends a document. It has no text: `encode` and `decode` raise ValueError."""

    vocab_size: int
    eos_id: int
    kind = "ids"
    file_name = "tokenizer.ids"
    bos_id = None
    pad_id = None

    @classmethod
    def from_bytes(cls, content: bytes) -> IdVocabulary:
        """Read what `to_bytes` wrote. Raises ValueError for anything else."""
        try:
            found = cls(**{name: int(value) for name, value in json.loads(content).items()})
        except (ValueError, TypeError, AttributeError, RecursionError, OverflowError) as error:
            raise ValueError(f"tokenizer.ids is damaged ({error}); restore it from a copy") from error
        if not 0 <= found.eos_id < found.vocab_size:
            raise ValueError(
                f"tokenizer.ids is damaged: its end token {found.eos_id} is not below {found.vocab_size}; restore it from a copy"
            )
        return found

    def encode(self, text: str) -> list[int]:
        """Raises ValueError."""
        self._refuse()

    def encode_documents(self, texts: Sequence[str]) -> tuple[Ids, Offsets]:
        """Raises ValueError."""
        self._refuse()

    def decode(self, ids: Sequence[int]) -> str:
        """Raises ValueError."""
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise ValueError(NEEDS_TEXT)

    def identity(self) -> str:
        """Digest of both numbers."""
        return hashlib.sha256(b"ids\0" + self.to_bytes()).hexdigest()

    def to_bytes(self) -> bytes:
        """Both numbers as JSON."""
        return json.dumps(asdict(self)).encode()


def require_text(tokenizer: Any, what: str) -> Any:
    """The tokenizer, a `Tokenizer` of tokenizer.py. Raises ValueError, beginning with `what` needs it, where there is only a vocabulary of ids."""
    if tokenizer.kind == IdVocabulary.kind:
        raise ValueError(f"{what}: {NEEDS_TEXT}")
    return tokenizer
