"""Parse a SentencePiece model file, and round its scores so that they add up exactly.

The classes are generated from `sentencepiece_model.proto` and come with the library. They need the protobuf package,
which the library itself does not.
"""

from __future__ import annotations

from typing import Any, TypeAlias

from sentencepiece import sentencepiece_model_pb2

ModelProto: TypeAlias = Any  # sentencepiece_model_pb2.ModelProto, whose attributes no stub declares
SentencePiece, TrainerSpec = sentencepiece_model_pb2.ModelProto.SentencePiece, sentencepiece_model_pb2.TrainerSpec
NORMAL, UNKNOWN, CONTROL = SentencePiece.NORMAL, SentencePiece.UNKNOWN, SentencePiece.CONTROL
USER_DEFINED = SentencePiece.USER_DEFINED
UNIGRAM, BPE = TrainerSpec.UNIGRAM, TrainerSpec.BPE
SCORE_STEP = 2.0**-9


def read_sentencepiece_model(content: bytes) -> ModelProto:
    """Parse the bytes of a .model file: `pieces` by id, `trainer_spec` and `normalizer_spec`."""
    return sentencepiece_model_pb2.ModelProto.FromString(content)


def round_scores(content: bytes) -> bytes:
    """Round every score of a model to a multiple of SCORE_STEP.

    Sums of such scores are exact in float32 and in float64 up to 2 ** 15, so the best segmentation is the same for every
    implementation of the search, whatever its precision and however many pieces came before; without it equal
    candidates (`#` `##` and `##` `#`) are told apart by rounding noise.
    """
    model = read_sentencepiece_model(content)
    for piece in model.pieces:
        piece.score = round(piece.score / SCORE_STEP) * SCORE_STEP
    return bytes(model.SerializeToString(deterministic=True))
