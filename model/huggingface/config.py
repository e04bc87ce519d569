"""Convert our ModelConfig to the config.json of each export target and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from amfm.model.config.kinds import CORE, kind_of
from amfm.model.config.mup import without_mup
from amfm.model.config.schema import ModelConfig
from amfm.model.huggingface.classes import BY_TYPE, WRITTEN
from amfm.model.huggingface.fields import registered_mixers
from amfm.model.huggingface.hf_class import Target


@dataclass(frozen=True)
class TokenIds:
    """Special ids of the tokenizer; None: it has none."""

    bos: int | None
    eos: int | None
    pad: int | None


def huggingface_config(
    config: ModelConfig, target: Target, tokens: TokenIds, *, max_position_embeddings: int
) -> dict[str, Any]:
    """Build config.json as a dict, for weights in float32. The configuration must fit the target (`explain_unfit`)."""
    config = _drop_unused_sections(without_mup(config))
    fields: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "max_position_embeddings": max_position_embeddings,
        "initializer_range": config.initializer_range,
        "bos_token_id": tokens.bos,
        "eos_token_id": tokens.eos,
        "pad_token_id": tokens.pad,
        "dtype": "float32",
        "use_cache": True,
    }
    found = WRITTEN[target]
    return fields | dict.fromkeys(found.length_names, max_position_embeddings) | found.fields(config)


def _drop_unused_sections(config: ModelConfig) -> ModelConfig:
    """Drop the sections whose letter the pattern lacks: config.json must not depend on what nothing reads."""
    letters = {part.symbol for letter in config.built_letters for part in kind_of(letter).parts}
    used = {name: getattr(config.mixers, name) for name in registered_mixers(config).values()}
    unused = {kind.section: None for kind in CORE if kind.symbol not in letters}
    return config.model_copy(update=unused | {"mixers": type(config.mixers)(**used)})


def model_config_from_huggingface(fields: Mapping[str, Any]) -> ModelConfig:
    """Build our configuration from the config.json of one of the classes that we read.

    `fields` is config.json with the class's defaults filled in. What config.json does not say (initialisation, loss
    weights) gets our defaults. Raises ValueError where the class uses something that our model does not have.
    """
    kind = fields.get("model_type")
    found = BY_TYPE.get(str(kind))
    if found is None:
        raise ValueError(f"config.json: model_type={kind} cannot be imported; use one of {', '.join(BY_TYPE)}")
    return found.read(fields)
