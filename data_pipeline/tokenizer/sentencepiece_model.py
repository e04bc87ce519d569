"""The pieces and settings inside a SentencePiece model file, read straight from its protobuf bytes, and exact scores.

Field numbers are those of `sentencepiece_model.proto` (google/sentencepiece, src/).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
UNIGRAM, BPE = 1, 2
SCORE_STEP = 2.0**-9


@dataclass(frozen=True)
class Piece:
    """One vocabulary entry; its id is its place."""

    text: str
    score: float
    kind: int


@dataclass(frozen=True)
class SentencePieceModel:
    """Pieces and settings of a model. Defaults are those of the format where a field is absent."""

    pieces: tuple[Piece, ...]
    algorithm: int
    byte_fallback: bool
    charsmap: bytes
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool
    escape_whitespaces: bool
    whitespace_is_suffix: bool

    def first_of_kind(self, kind: int) -> int | None:
        """Id of the first piece of a kind."""
        return next((index for index, piece in enumerate(self.pieces) if piece.kind == kind), None)


def read_sentencepiece_model(content: bytes) -> SentencePieceModel:
    """Parse the bytes of a .model file."""
    pieces: list[Piece] = []
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    for field, value in _fields(content):
        if field == 1:
            entry = dict(_fields(_bytes(value)))
            score = struct.unpack("<f", _bytes(entry.get(2, b"\0\0\0\0")))[0]
            pieces.append(Piece(_bytes(entry[1]).decode(), score, _int(entry.get(3, NORMAL))))
        elif field == 2:
            trainer = dict(_fields(_bytes(value)))
        elif field == 3:
            normalizer = dict(_fields(_bytes(value)))
    return SentencePieceModel(
        pieces=tuple(pieces),
        algorithm=_int(trainer.get(3, UNIGRAM)),
        byte_fallback=bool(trainer.get(35, 0)),
        charsmap=_bytes(normalizer.get(2, b"")),
        add_dummy_prefix=bool(normalizer.get(3, 1)),
        remove_extra_whitespaces=bool(normalizer.get(4, 1)),
        escape_whitespaces=bool(normalizer.get(5, 1)),
        whitespace_is_suffix=bool(trainer.get(24, 0)),
    )


def round_scores(content: bytes) -> bytes:
    """The same model with every score a multiple of SCORE_STEP.

    Sums of such scores are exact in float32 and in float64 up to 2 ** 15, so the best segmentation is the same for every
    implementation of the search, whatever its precision and however many pieces came before; without it equal
    candidates (`#` `##` and `##` `#`) are told apart by rounding noise.
    """
    rounded = bytearray(content)
    for start, end in _piece_ranges(content):
        position = start
        while position < end:
            key, position = _varint(content, position)
            if key == (2 << 3 | 5):
                score = struct.unpack_from("<f", content, position)[0]
                struct.pack_into("<f", rounded, position, round(score / SCORE_STEP) * SCORE_STEP)
            position = _after_value(content, position, key & 7)
    return bytes(rounded)


def _piece_ranges(content: bytes) -> Iterator[tuple[int, int]]:
    """Where the message of each piece begins and ends."""
    position = 0
    while position < len(content):
        key, position = _varint(content, position)
        end = _after_value(content, position, key & 7)
        if key == (1 << 3 | 2):
            length, start = _varint(content, position)
            yield start, start + length
        position = end


def _after_value(content: bytes, position: int, wire: int) -> int:
    """The position after a value of this wire type."""
    if wire == 0:
        return _varint(content, position)[1]
    if wire == 2:
        length, start = _varint(content, position)
        return start + length
    if wire in (1, 5):
        return position + (8 if wire == 1 else 4)
    raise ValueError(f"the SentencePiece model has wire type {wire}, which the format does not use; it is damaged")


def _int(value: int | bytes) -> int:
    assert isinstance(value, int), "a number was expected in the SentencePiece model"
    return value


def _bytes(value: int | bytes) -> bytes:
    assert isinstance(value, bytes), "bytes were expected in the SentencePiece model"
    return value


def _varint(content: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = content[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7


def _fields(content: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of a message, in order: numbers for varints, bytes for everything else."""
    position = 0
    while position < len(content):
        key, position = _varint(content, position)
        wire, start = key & 7, position
        position = _after_value(content, start, wire)
        if wire == 0:
            yield key >> 3, _varint(content, start)[0]
        elif wire == 2:
            yield key >> 3, content[_varint(content, start)[1] : position]
        else:
            yield key >> 3, content[start:position]
