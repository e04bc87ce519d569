"""The tokenizer of an export: files from which AutoTokenizer gives the ids that training used.

A SentencePiece model becomes a `tokenizer.json` of the tokenizers library, so that reading it needs no SentencePiece; a
tokenizer that came as `tokenizer.json` loses only what would add tokens to a text. The file that training used lies
beside it for readers that want it, our import among them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from data_pipeline.tokenizer.sentencepiece_model import (
    BPE,
    CONTROL,
    NORMAL,
    UNIGRAM,
    UNKNOWN,
    USER_DEFINED,
    SentencePieceModel,
    read_sentencepiece_model,
)
from data_pipeline.tokenizer.tokenizer import Tokenizer

MODEL_FILE = "tokenizer.model"
ORIGINAL_JSON = "amfm_tokenizer.json"
SPACE = "\u2581"
# Score of pieces that text must never match: below any sum of real ones, and small enough to keep float64 exact.
NEVER = -1e4


def write_tokenizer(tokenizer: Tokenizer, folder: Path, *, max_length: int) -> list[str]:
    """Write tokenizer.json, tokenizer_config.json and the file that training used; returns their names.

    Raises ValueError for a model that the tokenizers library cannot express.
    """
    content = tokenizer.to_bytes()
    special = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id, "pad_token": tokenizer.pad_id}
    if tokenizer.kind == "sentencepiece":
        model = read_sentencepiece_model(content)
        build_fast_tokenizer(model).save(str(folder / "tokenizer.json"))
        special["unk_token"] = model.first_of_kind(UNKNOWN)
        texts = {name: model.pieces[index].text for name, index in special.items() if index is not None}
        original = MODEL_FILE
    else:
        plain = without_added_tokens(content)
        (folder / "tokenizer.json").write_bytes(plain)
        texts = {name: _token_text(plain, index) for name, index in special.items() if index is not None}
        original = ORIGINAL_JSON
    (folder / original).write_bytes(content)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
        # Control tokens written out in a text stay text, as in training.
        "split_special_tokens": True,
        **texts,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
    return ["tokenizer.json", "tokenizer_config.json", original]


def without_added_tokens(content: bytes) -> bytes:
    """A tokenizer.json that adds no begin or end token and neither cuts nor pads, as training used it."""
    description = json.loads(content)
    description["truncation"] = description["padding"] = None
    processor = description.get("post_processor") or {"type": "Sequence", "processors": []}
    steps = processor["processors"] if processor["type"] == "Sequence" else [processor]
    kept = [step for step in steps if step["type"] == "ByteLevel"]
    description["post_processor"] = {"type": "Sequence", "processors": kept} if kept else None
    return json.dumps(description, ensure_ascii=False).encode()


def _token_text(content: bytes, index: int) -> str:
    from tokenizers import Tokenizer

    return str(Tokenizer.from_buffer(content).id_to_token(index))


def build_fast_tokenizer(model: SentencePieceModel) -> Any:
    """A `tokenizers.Tokenizer` that gives the ids of the SentencePiece model."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers

    if model.whitespace_is_suffix:
        raise ValueError("treat_whitespace_as_suffix=true cannot be exported; train the tokenizer without it")
    fast = Tokenizer(_build_model(model))
    steps: list[Any] = []
    if model.charsmap:
        steps.append(normalizers.Precompiled(model.charsmap))
    if model.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if model.add_dummy_prefix:
        steps.append(normalizers.Prepend(" "))
    if model.escape_whitespaces:
        steps.append(normalizers.Replace(" ", SPACE))
    fast.normalizer = normalizers.Sequence(steps)
    strangers = _characters_to_isolate(model)
    if strangers:
        pattern = Regex("[" + "".join(f"\\x{{{ord(character):x}}}" for character in strangers) + "]+")
        fast.pre_tokenizer = pre_tokenizers.Split(pattern, behavior="isolated")
    ends: list[Any] = [decoders.Replace(SPACE, " ")]
    if model.byte_fallback:
        ends.append(decoders.ByteFallback())
    ends.append(decoders.Fuse())
    if model.add_dummy_prefix:
        ends.append(decoders.Strip(content=" ", left=1, right=0))
    fast.decoder = decoders.Sequence(ends)
    special = [
        AddedToken(piece.text, normalized=False, special=True) for piece in model.pieces if piece.kind == CONTROL
    ]
    fast.add_special_tokens(special)
    fast.add_tokens(
        [AddedToken(p.text, normalized=False, special=False) for p in model.pieces if p.kind == USER_DEFINED]
    )
    return fast


def _build_model(model: SentencePieceModel) -> Any:
    from tokenizers import models

    unknown = model.first_of_kind(UNKNOWN)
    if model.algorithm == UNIGRAM:
        # SentencePiece matches text with normal pieces only; the library would match any, so others score too low to win
        # against normal ones. An unknown character scores lower still and stays the last resort that it was.
        vocabulary = [(piece.text, piece.score if piece.kind == NORMAL else NEVER) for piece in model.pieces]
        return models.Unigram(vocabulary, unk_id=unknown, byte_fallback=model.byte_fallback)
    if model.algorithm == BPE:
        return models.BPE(
            vocab={piece.text: index for index, piece in enumerate(model.pieces)},
            merges=_ranked_merges(model),
            unk_token=model.pieces[unknown].text if unknown is not None else None,
            fuse_unk=True,
            byte_fallback=model.byte_fallback,
        )
    raise ValueError(f"SentencePiece model type {model.algorithm} cannot be exported; use unigram (1) or bpe (2)")


def _characters_to_isolate(model: SentencePieceModel) -> list[str]:
    """Unknown characters of pieces that text must never match, such as `<` of `<s>`: apart they cannot form the piece."""
    if model.algorithm != UNIGRAM:
        return []
    known = {piece.text for piece in model.pieces if piece.kind == NORMAL}
    literal = "".join(piece.text for piece in model.pieces if piece.kind not in (NORMAL, USER_DEFINED))
    return sorted(set(literal) - known)


def _ranked_merges(model: SentencePieceModel) -> list[tuple[str, str]]:
    """Pairs in the order in which SentencePiece prefers their union: by its score, then by its id."""
    normal = {piece.text: (-piece.score, index) for index, piece in enumerate(model.pieces) if piece.kind == NORMAL}
    ranked = [
        (rank, text[:cut], text[cut:])
        for text, rank in normal.items()
        for cut in range(1, len(text))
        if text[:cut] in normal and text[cut:] in normal
    ]
    return [(left, right) for _, left, right in sorted(ranked)]
