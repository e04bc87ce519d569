"""SentencePiece models as far as they need protobuf: trained, read, and their scores rounded so that they add up exactly.

The classes are generated from `sentencepiece_model.proto` and come with the library. They need the protobuf package,
which the library itself does not. A run on a prepared store goes without it and this file.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import Any, TypeAlias

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from amfm.data_pipeline.config import TokenizerConfig
from amfm.data_pipeline.tokenizer.tokenizer import SentencePieceTokenizer

TRAINING_THREADS = 4  # fixed: the merge of the trainer's sums depends on it, and stores must be byte-identical
MAX_TRAINING_LINE = 4096  # bytes; longer lines are cut, the trainer would drop them
ModelProto: TypeAlias = Any  # sentencepiece_model_pb2.ModelProto, whose attributes no stub declares
SentencePiece, TrainerSpec = sentencepiece_model_pb2.ModelProto.SentencePiece, sentencepiece_model_pb2.TrainerSpec
NORMAL, UNKNOWN, CONTROL = SentencePiece.NORMAL, SentencePiece.UNKNOWN, SentencePiece.CONTROL
USER_DEFINED = SentencePiece.USER_DEFINED
UNIGRAM, BPE = TrainerSpec.UNIGRAM, TrainerSpec.BPE
SCORE_STEP = 2.0**-9


def train_tokenizer(texts: Iterable[str], config: TokenizerConfig) -> SentencePieceTokenizer:
    """Train a SentencePiece model on texts; the same texts and settings give the same bytes.

    Text is kept as it is (no normalisation, no added space, spaces kept), newlines and unknown characters become
    byte pieces, so decoding gives the text back. Ids 0 to 3: unknown, begin, end, padding.
    ValueError when the text is too small for the vocabulary.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_training_lines(texts),
            model_writer=model,
            model_type=config.algorithm,
            vocab_size=config.vocab_size,
            byte_fallback=config.byte_fallback,
            user_defined_symbols=[] if config.byte_fallback else ["\n"],
            control_symbols=list(config.control_tokens),
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            shuffle_input_sentence=False,
            max_sentence_length=2 * MAX_TRAINING_LINE,
            num_threads=TRAINING_THREADS,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].rpartition("] ")[2].rstrip(".") or "no text to train on"
        raise ValueError(
            f"data.tokenizer.vocab_size={config.vocab_size} must fit the training text (SentencePiece: {reason}); "
            "lower it, or give more text"
        ) from error
    return SentencePieceTokenizer(round_scores(model.getvalue()))


def _training_lines(texts: Iterable[str]) -> Iterable[str]:
    """Cut texts into lines that the trainer takes: a character has up to 4 bytes, and NUL is not allowed."""
    for text in texts:
        for line in text.split("\n"):
            for start in range(0, len(line), MAX_TRAINING_LINE // 4):
                piece = line[start : start + MAX_TRAINING_LINE // 4].replace("\0", "")
                if piece.strip():
                    yield piece


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
