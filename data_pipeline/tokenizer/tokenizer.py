"""Text to token ids and back: SentencePiece models, trained here or given, and tokenizer.json; known by their content.

A store holds a copy of its tokenizer, and its identity is a hash of the file: two names for one tokenizer are one, and a file
that changed under its name is noticed. Text must come back from its ids and must not be able to end a document, so nothing
is normalised in training, and control tokens written out in a text are plain text. Encoding must give the same ids on every
machine, in any batch and at any place in a text; `_encode` and `round_scores` say what that takes with SentencePiece.

Tokenizers of installed packages: a file whose suffix a package registers is read by its class.

A package registers one with an entry point of the group `amfm.tokenizers`: its name is the suffix of the files, and it names a
class that is built from the content of one and has what `Tokenizer` (tokenizer.py) asks for. `kind` is the suffix, and a store
has the file as `tokenizer.SUFFIX`. Preparation sends the class to its actors, so its instances must pickle. With
`to_tokenizer_json() -> bytes` it can be exported: a tokenizer.json of the same ids. Conversations and fill-in-the-middle need
`control_tokens`, `find_token` and `encode_spans` of it, as `MarkingTokenizer` has them.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import sentencepiece

from amfm.data_pipeline.durable.files import make_folders, write_file_atomically
from amfm.data_pipeline.store.manifest import MANIFEST
from amfm.data_pipeline.store.object_store import is_url
from amfm.data_pipeline.store.store import TokenStore
from amfm.data_pipeline.tokenizer.huggingface import HuggingFaceTokenizer, Ids, Offsets, read_tokenizer_json

ENTRY_POINTS = "amfm.tokenizers"
OURS = ("model", "json", "ids")


@cache
def tokenizer_entries() -> dict[str, EntryPoint]:
    """Entry points by suffix. Raises RuntimeError for one that is registered twice or is ours."""
    found: dict[str, EntryPoint] = {}
    for entry in entry_points(group=ENTRY_POINTS):
        if entry.name in {*found, *OURS}:
            raise RuntimeError(
                f"{describe_entry(entry)} registers a suffix that is taken; uninstall one of the packages, or rename it"
            )
        found[entry.name] = entry
    return found


def read_registered(suffix: str, content: bytes) -> Any:
    """Build a package's tokenizer, a `Tokenizer`, from the content of a file. Raises RuntimeError if its package is broken."""
    entry = tokenizer_entries()[suffix]
    try:
        build: Callable[[bytes], Any] = entry.load()
    except (ImportError, AttributeError) as error:
        raise RuntimeError(
            f"{describe_entry(entry)} cannot be loaded ({error}); fix or uninstall its package"
        ) from error
    tokenizer = build(content)
    if (tokenizer.kind, tokenizer.file_name) != (suffix, f"tokenizer.{suffix}"):
        raise RuntimeError(
            f"{describe_entry(entry)}: its kind is {tokenizer.kind!r} and its file {tokenizer.file_name!r}; they must be "
            f"{suffix!r} and 'tokenizer.{suffix}': fix its package"
        )
    return tokenizer


def describe_entry(entry: EntryPoint) -> str:
    """Describe an entry point and its package, for messages."""
    package = entry.dist.name if entry.dist is not None else "an unknown package"
    return f"the entry point {entry.name} = {entry.value} of {package} (group {entry.group})"


KEPT_FOLDER = "tokenizer"  # of a run directory
EOS_FILE = "eos_id"  # next to a tokenizer that is kept: a tokenizer.json does not name its end
# Characters after which a text is cut at the next newline: few enough that sums of scores (round_scores) stay exact.
BLOCK_CHARACTERS = 4000


class Tokenizer(Protocol):
    """What preparation, generation and export need of a tokenizer."""

    @property
    def kind(self) -> str:
        """Format of the file."""

    @property
    def file_name(self) -> str:
        """Name of the file in a store."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""

    @property
    def bos_id(self) -> int | None:
        """Begin-of-text token, which we never insert."""

    @property
    def eos_id(self) -> int:
        """Token that ends a document."""

    @property
    def pad_id(self) -> int | None:
        """Token that fills rows."""

    def encode(self, text: str) -> list[int]:
        """Encode a text, without begin or end tokens; control tokens written out in the text stay plain text."""

    def encode_documents(self, texts: Sequence[str]) -> tuple[Ids, Offsets]:
        """Ids of all texts one after another, each ending in one end token, and the offset after each.

        What preparation calls: to join the ids of blocks to texts, and texts to documents, costs one copy.
        """

    def decode(self, ids: Sequence[int]) -> str:
        """Decode ids to text."""

    def identity(self) -> str:
        """Content hash: equal identities give equal ids for every text."""

    def to_bytes(self) -> bytes:
        """Content of the tokenizer file."""


@runtime_checkable
class MarkingTokenizer(Tokenizer, Protocol):
    """What conversations and fill-in-the-middle need besides."""

    def control_tokens(self) -> dict[str, int]:
        """Ids of the tokens that no text becomes, by how a chat template writes them."""

    def find_token(self, text: str) -> int | None:
        """Id of a token of this text, a control token or not; None where there is none."""

    def encode_spans(
        self, text: str, spans: Sequence[tuple[int, int]], *, has_control_tokens: bool
    ) -> tuple[list[int], list[bool]]:
        """Ids of a text without an end token, and which of them begin in one of the spans of characters, which rise.

        has_control_tokens: those that are written out are tokens, as a chat template means them.
        """


def require_marking(tokenizer: Tokenizer, what: str) -> MarkingTokenizer:
    """The tokenizer. Raises ValueError for a package's that lacks what conversations and fill-in-the-middle need."""
    if not isinstance(tokenizer, MarkingTokenizer):
        raise ValueError(  # noqa: TRY004 - a setting is wrong
            f"{what} needs a tokenizer with control tokens, and one of kind {tokenizer.kind!r} has none; give a SentencePiece "
            "model or a tokenizer.json"
        )
    return tokenizer


class SentencePieceTokenizer:
    """A SentencePiece model (Kudo and Richardson 2018, arXiv 1808.06226); unigram or BPE."""

    kind = "sentencepiece"
    file_name = "tokenizer.model"

    def __init__(self, model: bytes) -> None:
        self._model = model
        self._processor = sentencepiece.SentencePieceProcessor()
        self._processor.LoadFromSerializedProto(model)
        if self._processor.eos_id() < 0:
            raise ValueError("the SentencePiece model has no end-of-text piece (eos_id); train it with one")
        self._newline_id = _find_newline_id(self._processor)

    def __reduce__(self) -> tuple[type[SentencePieceTokenizer], tuple[bytes]]:
        return SentencePieceTokenizer, (self._model,)

    @property
    def vocab_size(self) -> int:
        """Pieces of the model."""
        return int(self._processor.vocab_size())

    @property
    def bos_id(self) -> int | None:
        """Begin-of-text id, None if the model has none."""
        return _none_if_negative(self._processor.bos_id())

    @property
    def eos_id(self) -> int:
        """End-of-text id."""
        return int(self._processor.eos_id())

    @property
    def pad_id(self) -> int | None:
        """Padding id, None if the model has none."""
        return _none_if_negative(self._processor.pad_id())

    def encode(self, text: str) -> list[int]:
        """Encode one text to ids."""
        return [int(index) for index in self._encode([text], end=b"")[0].tolist()]

    def encode_documents(self, texts: Sequence[str]) -> tuple[Ids, Offsets]:
        """Encode texts, an end token after each: SentencePiece never makes one of text, so none is there yet."""
        return self._encode(texts, end=np.int32(self.eos_id).tobytes())

    def _encode(self, texts: Sequence[str], end: bytes) -> tuple[Ids, Offsets]:
        """Encode texts: ids one after another with `end` (bytes of int32 ids) after each, and the offset after each.

        Where the model allows it a text is encoded in blocks that end at newlines: SentencePiece adds up scores in
        float32, so in a long text noise would decide between segmentations, differently at each place.
        """
        blocks = [[text] if self._newline_id is None else _cut_at_newlines(text) for text in texts]
        flat = [block for text_blocks in blocks for block in text_blocks]
        encoded = self._processor.encode(flat, out_type="numpy", num_threads=1)
        newline = np.int32(self._newline_id or 0).tobytes()
        documents, start = [], 0
        for text_blocks in blocks:  # joined as bytes: half the time of np.concatenate for thousands of short arrays
            stop = start + len(text_blocks)
            documents.append(newline.join(encoded[start:stop]) + end)
            start = stop
        ends = np.cumsum([len(document) // np.dtype(np.int32).itemsize for document in documents], dtype=np.int64)
        return np.frombuffer(b"".join(documents), np.int32), ends

    def control_tokens(self) -> dict[str, int]:
        """Ids of control pieces, by their text."""
        pieces = self._processor
        return {pieces.id_to_piece(index): index for index in range(self.vocab_size) if pieces.is_control(index)}

    def find_token(self, text: str) -> int | None:
        """Id of a piece of this text; None where there is none."""
        index = int(self._processor.piece_to_id(text))
        return index if self._processor.id_to_piece(index) == text else None

    def encode_spans(
        self, text: str, spans: Sequence[tuple[int, int]], *, has_control_tokens: bool
    ) -> tuple[list[int], list[bool]]:
        """Ids of a text without an end token, and which of them are of the spans of characters, which rise.

        What lies between the ends of spans and control tokens is encoded on its own, as a prompt and its answer are.
        Raises ValueError for a model that writes a space in front of each of them.
        """
        if self._processor.encode("a", out_type=str)[0].startswith("\u2581"):
            raise ValueError(
                "the SentencePiece model puts a space in front of every text, and so between a prompt and its answer; give the "
                "tokenizer.json of this tokenizer"
            )
        ids, counted = list[int](), list[bool]()
        control = self.control_tokens() if has_control_tokens else {}
        pattern = (
            re.compile(f"({'|'.join(map(re.escape, sorted(control, key=len, reverse=True)))})") if control else None
        )
        edges = [0, *(edge for span in spans for edge in span), len(text)]
        for number, (start, stop) in enumerate(pairwise(edges)):
            for piece in pattern.split(text[start:stop]) if pattern else [text[start:stop]]:
                new = [control[piece]] if piece in control else self.encode(piece) if piece else []
                ids += new
                counted += [number % 2 == 1] * len(new)
        return ids, counted

    def decode(self, ids: Sequence[int]) -> str:
        """Decode ids to text; control pieces give nothing. ValueError for an id outside the vocabulary."""
        outside = [index for index in ids if not 0 <= index < self.vocab_size]
        if outside:
            raise ValueError(f"token id {outside[0]} must be in range({self.vocab_size}), the tokenizer's vocabulary")
        return str(self._processor.decode([int(index) for index in ids]))

    def identity(self) -> str:
        """SHA-256 of the model file: the normaliser and all options are inside it."""
        return hashlib.sha256(b"sentencepiece\0" + self._model).hexdigest()

    def to_bytes(self) -> bytes:
        """Content of the .model file."""
        return self._model


def _cut_at_newlines(text: str) -> list[str]:
    """Cut a text into blocks at the first newline after each BLOCK_CHARACTERS; those newlines are left out."""
    blocks, start = [], 0
    while (cut := text.find("\n", start + BLOCK_CHARACTERS)) >= 0:
        blocks.append(text[start:cut])
        start = cut + 1
    return [*blocks, text[start:]]


def _find_newline_id(processor: sentencepiece.SentencePieceProcessor) -> int | None:
    """Find the id of the newline, if encoding the parts around one on their own gives the ids of the whole; else
    None.
    """
    ids = processor.encode("\n", out_type=int)
    holds_newline = any(
        "\n" in processor.id_to_piece(index) for index in range(processor.vocab_size()) if [index] != ids
    )
    if len(ids) != 1 or ids[0] == processor.unk_id() or holds_newline:
        return None
    # A model that adds a space in front, drops spaces or rewrites characters shows it here.
    left, right = "a\u00e9 \n", " \n\u00e9a"
    parts = [*processor.encode(left, out_type=int), ids[0], *processor.encode(right, out_type=int)]
    return int(ids[0]) if parts == processor.encode(f"{left}\n{right}", out_type=int) else None


def _none_if_negative(index: int) -> int | None:
    return None if index < 0 else int(index)


def tokenizer_files() -> list[str]:
    """Names that a tokenizer's file may have in a store."""
    return [
        "tokenizer.model",
        HuggingFaceTokenizer.file_name,
        "tokenizer.ids",
        *(f"tokenizer.{suffix}" for suffix in tokenizer_entries()),
    ]


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a tokenizer from a prepared store, or from a SentencePiece .model or a Hugging Face tokenizer.json file.

    From a store its content is checked against the identity in the manifest. ValueError when the file is missing or
    no tokenizer, RuntimeError when the store's tokenizer was changed.
    """
    if not is_url(str(path)) and not Path(path).is_dir() and not (Path(path) / MANIFEST).exists():
        return read_tokenizer_file(Path(path))
    store = TokenStore.open(path)
    tokenizer = read_tokenizer_file(store.tokenizer_path, store.eos_id)
    if tokenizer.identity() != store.tokenizer_identity:
        raise RuntimeError(
            f"{store.tokenizer_path} has identity {tokenizer.identity()}, but the store was written with "
            f"{store.tokenizer_identity}; restore the file from a copy or prepare the store again"
        )
    return tokenizer


def read_tokenizer_file(path: Path, eos: str | int | None = None) -> Tokenizer:
    """Load a SentencePiece .model file, a package's, or a tokenizer.json whose end-of-text token is `eos` (token or id).

    A .model names its own end; for a .json without `eos`, tokenizer_config.json next to it must.
    """
    if not path.is_file():
        raise ValueError(
            f"tokenizer file {path} does not exist; name a SentencePiece .model file, a tokenizer.json or a prepared store"
        )
    if path.suffix == ".json":
        return read_tokenizer_json(path, eos)
    content, suffix = path.read_bytes(), path.suffix.removeprefix(".")
    if suffix == "ids":
        from amfm.data_pipeline.tokenizer.id_vocabulary import IdVocabulary

        return IdVocabulary.from_bytes(content)
    if suffix in tokenizer_entries():
        return read_registered(suffix, content)
    try:
        return SentencePieceTokenizer(content)
    except RuntimeError as error:  # its words are those of C++
        remedy = "name a .model file"
        if suffix != "model":
            remedy += f", or install the package that registers {suffix!r} under the entry point group {ENTRY_POINTS}"
        raise ValueError(f"{path} is not a SentencePiece model, or is damaged; {remedy}") from error


def keep_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write a tokenizer into a folder of its own, from which `read_kept_tokenizer` reads it; one that is there stays."""
    file = folder / tokenizer.file_name
    if file.is_file():
        return
    make_folders(folder)
    write_file_atomically(folder / EOS_FILE, str(tokenizer.eos_id).encode())
    write_file_atomically(file, tokenizer.to_bytes())  # last: a file that is there is whole


def read_kept_tokenizer(folder: Path) -> Tokenizer | None:
    """Read what `keep_tokenizer` wrote; None if there is nothing. Raises ValueError for files that are damaged."""
    files = sorted(folder.glob("tokenizer.*"))
    if not files:
        return None
    text = (folder / EOS_FILE).read_text(encoding="utf-8") if (folder / EOS_FILE).is_file() else ""
    if not text.isdigit():
        raise ValueError(f"{folder / EOS_FILE} must hold the id of the end-of-text token; copy it from the run again")
    return read_tokenizer_file(files[0], int(text))
