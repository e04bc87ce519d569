"""The tokenizer of an export: files from which AutoTokenizer gives the ids that training used.

A SentencePiece model becomes a `tokenizer.json` of the tokenizers library, so that reading it needs no SentencePiece; a
tokenizer that came as `tokenizer.json` loses only what would add tokens to a text. The file that training used is
next to it for readers that want it, our import among them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from amfm.data_pipeline.tokenizer.id_vocabulary import IdVocabulary
from amfm.data_pipeline.tokenizer.sentencepiece_model import (
    BPE,
    CONTROL,
    NORMAL,
    UNIGRAM,
    UNKNOWN,
    USER_DEFINED,
    ModelProto,
    read_sentencepiece_model,
)
from amfm.data_pipeline.tokenizer.tokenizer import Tokenizer
from amfm.pretrain.inference.released import Released

# Files of an export that transformers does not have.
OUR_DESCRIPTION = "amfm_model.json"
MODEL_FILE = "tokenizer.model"
ORIGINAL_JSON = "amfm_tokenizer.json"
SPACE = "\u2581"
# Score of pieces that text must never match: below any sum of real ones, and small enough to keep float64 exact.
NEVER = -1e4


def write_tokenizer(
    tokenizer: Tokenizer, folder: Path, released: Released | None = None, *, max_length: int
) -> list[str]:
    """Write tokenizer.json, tokenizer_config.json and the file that training used; returns their names.

    released: the special tokens and the chat template of the model that this one continues.

    Training took control tokens written out in a text as text; a reader gets that with `split_special_tokens=True` in the
    call. The files must not say it: a fine-tuning program writes `</s>` into its texts to end them, and would train on letters.
    Of a model of token ids only its vocabulary is written. Raises ValueError for a model that the tokenizers library cannot
    express.
    """
    content = tokenizer.to_bytes()
    if tokenizer.kind == IdVocabulary.kind:
        (folder / tokenizer.file_name).write_bytes(content)
        return [tokenizer.file_name]
    special = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id, "pad_token": tokenizer.pad_id}
    space_before: dict[str, bool] = {}
    if tokenizer.kind == "sentencepiece":
        model = read_sentencepiece_model(content)
        build_fast_tokenizer(model).save(str(folder / "tokenizer.json"))
        special["unk_token"] = _find_unknown(model)
        texts = {name: model.pieces[index].piece for name, index in special.items() if index is not None}
        space_before = {"add_prefix_space": model.normalizer_spec.add_dummy_prefix}
        original = MODEL_FILE
    else:
        plain = without_added_tokens(tokenizer_json(tokenizer))
        (folder / "tokenizer.json").write_bytes(plain)
        texts = {name: _token_text(plain, index) for name, index in special.items() if index is not None}
        original = ORIGINAL_JSON if tokenizer.kind == "huggingface" else tokenizer.file_name
    (folder / original).write_bytes(content)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
        # llama.cpp adds a begin token and a space to texts where the file does not say otherwise.
        "add_bos_token": False,
        "add_eos_token": False,
        **space_before,
        **texts,
        **(released.special_tokens if released is not None else {}),
    }
    template = None if released is None else released.chat_template
    if isinstance(template, str):
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    elif template is not None:  # several by name
        settings["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
    return ["tokenizer.json", "tokenizer_config.json", original]


def tokenizer_json(tokenizer: Tokenizer) -> bytes:
    """The tokenizer.json of a tokenizer that is not one of SentencePiece. Raises ValueError for a package's that has none."""
    if tokenizer.kind == "huggingface":
        return tokenizer.to_bytes()
    write: Callable[[], bytes] | None = getattr(tokenizer, "to_tokenizer_json", None)
    if write is None:
        raise ValueError(
            f"the tokenizer {tokenizer.kind} of a package has no to_tokenizer_json(), which an export needs; add it to its class"
        )
    return write()


def without_added_tokens(content: bytes) -> bytes:
    """Rewrite a tokenizer.json to add no begin or end token and neither cut nor pad, as training used it.

    Of its post-processor only the ByteLevel steps stay, which change offsets and no ids.
    """
    description = json.loads(content)
    description["truncation"] = description["padding"] = None
    processor = description.get("post_processor") or {"type": "Sequence", "processors": []}
    steps = processor["processors"] if processor["type"] == "Sequence" else [processor]
    kept = [step for step in steps if step["type"] == "ByteLevel"]
    description["post_processor"] = {"type": "Sequence", "processors": kept} if kept else None
    return json.dumps(description, ensure_ascii=False).encode()


def _token_text(content: bytes, index: int) -> str:
    """Look up the text of an id in a tokenizer.json."""
    from tokenizers import Tokenizer

    return str(Tokenizer.from_buffer(content).id_to_token(index))


def build_fast_tokenizer(model: ModelProto) -> Any:
    """Build a `tokenizers.Tokenizer` that gives the ids of the SentencePiece model.

    SentencePiece's normalizer becomes a sequence of replacements in its own order: character map, extra spaces, the space
    before a text, spaces to `\u2581`. Decoding runs them backwards. Raises ValueError for what the library cannot express.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers

    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    if trainer.treat_whitespace_as_suffix:
        raise ValueError("treat_whitespace_as_suffix=true cannot be exported; train the tokenizer without it")
    fast = Tokenizer(_build_model(model))
    steps: list[Any] = []
    if normalizer.precompiled_charsmap:
        steps.append(normalizers.Precompiled(normalizer.precompiled_charsmap))
    if normalizer.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if normalizer.add_dummy_prefix:
        steps.append(normalizers.Prepend(" "))
    if normalizer.escape_whitespaces:
        steps.append(normalizers.Replace(" ", SPACE))
    fast.normalizer = normalizers.Sequence(steps)
    strangers = _characters_to_isolate(model)
    if strangers:
        pattern = Regex("[" + "".join(f"\\x{{{ord(character):x}}}" for character in strangers) + "]+")
        fast.pre_tokenizer = pre_tokenizers.Split(pattern, behavior="isolated")
    ends: list[Any] = [decoders.Replace(SPACE, " ")]
    if trainer.byte_fallback:
        ends.append(decoders.ByteFallback())
    ends.append(decoders.Fuse())
    if normalizer.add_dummy_prefix:
        ends.append(decoders.Strip(content=" ", left=1, right=0))
    fast.decoder = decoders.Sequence(ends)
    special = [
        AddedToken(piece.piece, normalized=False, special=True) for piece in model.pieces if piece.type == CONTROL
    ]
    fast.add_special_tokens(special)
    fast.add_tokens(
        [AddedToken(p.piece, normalized=False, special=False) for p in model.pieces if p.type == USER_DEFINED]
    )
    return fast


def _build_model(model: ModelProto) -> Any:
    """Build the library's unigram or BPE model with the pieces, scores and ids of SentencePiece's."""
    from tokenizers import models

    unknown, trainer = _find_unknown(model), model.trainer_spec
    if trainer.model_type == UNIGRAM:
        # SentencePiece matches text with normal pieces only; the library would match any, so others score too low to win
        # against normal ones. An unknown character scores lower still and stays the last resort that it was.
        vocabulary = [(piece.piece, piece.score if piece.type == NORMAL else NEVER) for piece in model.pieces]
        return models.Unigram(vocabulary, unk_id=unknown, byte_fallback=trainer.byte_fallback)
    if trainer.model_type == BPE:
        return models.BPE(
            vocab={piece.piece: index for index, piece in enumerate(model.pieces)},
            merges=_ranked_merges(model),
            unk_token=model.pieces[unknown].piece if unknown is not None else None,
            fuse_unk=True,
            byte_fallback=trainer.byte_fallback,
        )
    raise ValueError(f"SentencePiece model type {trainer.model_type} cannot be exported; use unigram (1) or bpe (2)")


def _find_unknown(model: ModelProto) -> int | None:
    """Find the id of the piece that stands for unknown characters; None if the model has none."""
    return next((index for index, piece in enumerate(model.pieces) if piece.type == UNKNOWN), None)


def _characters_to_isolate(model: ModelProto) -> list[str]:
    """List the characters outside the vocabulary that occur in pieces which text must never match, such as `<` of `<s>`.

    Split off before matching, they cannot form such a piece. Only for unigram models.
    """
    if model.trainer_spec.model_type != UNIGRAM:
        return []
    known = {piece.piece for piece in model.pieces if piece.type == NORMAL}
    literal = "".join(piece.piece for piece in model.pieces if piece.type not in (NORMAL, USER_DEFINED))
    return sorted(set(literal) - known)


def _ranked_merges(model: ModelProto) -> list[tuple[str, str]]:
    """Derive the merges of a BPE model: pairs in the order in which SentencePiece prefers their union, by score, then id.

    SentencePiece keeps no list of merges: any two pieces whose union is a piece may merge.
    """
    normal = {piece.piece: (-piece.score, index) for index, piece in enumerate(model.pieces) if piece.type == NORMAL}
    ranked = [
        (rank, text[:cut], text[cut:])
        for text, rank in normal.items()
        for cut in range(1, len(text))
        if text[:cut] in normal and text[cut:] in normal
    ]
    return [(left, right) for _, left, right in sorted(ranked)]
