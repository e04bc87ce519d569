"""All classes of transformers that we read or write. The order of the native ones is the order in which `auto` tries them.

Classes of packages are written where they are asked for by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from amfm.model.config.kinds import CORE, kind_of
from amfm.model.config.mup import without_mup
from amfm.model.config.plugins import describe_entry, installed_specs
from amfm.model.config.schema import ModelConfig
from amfm.model.config.variants import Variants
from amfm.model.huggingface import (
    deepseek_v3,
    falcon_h1,
    gpt_oss,
    granitemoehybrid,
    kimi_linear,
    lfm2,
    nemotron_h,
    olmo_hybrid,
    own,
    qwen3_next,
)
from amfm.model.huggingface.entries import WeightMap
from amfm.model.huggingface.fields import registered_mixers
from amfm.model.huggingface.hf_class import ENTRY_POINTS, HfClass, HfTarget, Source, Target
from amfm.model.huggingface.plain.families import FAMILIES
from amfm.model.huggingface.plain.fields import plain_class

CLASSES: tuple[HfClass, ...] = (
    *(plain_class(family) for family in FAMILIES),
    nemotron_h.CLASS,
    granitemoehybrid.CLASS,
    qwen3_next.CLASS,
    qwen3_next.QWEN3_5_MOE_CLASS,
    qwen3_next.QWEN3_5_CLASS,
    kimi_linear.CLASS,
    deepseek_v3.CLASS,
    deepseek_v3.V32_CLASS,
    deepseek_v3.V2_CLASS,
    deepseek_v3.GLM_CLASS,
    olmo_hybrid.CLASS,
    kimi_linear.BAILING_CLASS,
    lfm2.CLASS,
    lfm2.MOE_CLASS,
    gpt_oss.CLASS,
    falcon_h1.CLASS,
    own.CLASS,
)


def packaged_targets() -> dict[Target, HfTarget]:
    """Load the targets of installed packages. Raises RuntimeError as mixers do, and for a name that is taken or not the entry's."""
    found: dict[Target, HfTarget] = {}
    for entry, target in installed_specs(ENTRY_POINTS, HfTarget):
        if target.name != entry.name or target.name in {*found, *(ours.name for ours in CLASSES)}:
            raise RuntimeError(
                f"{describe_entry(entry)} registers the export target {target.name!r}, which must be the entry point's name and "
                "new; fix or uninstall its package"
            )
        found[target.name] = target
    return found


OURS: dict[Target, HfTarget] = {found.name: found for found in CLASSES if isinstance(found, HfTarget)}
WRITTEN: dict[Target, HfTarget] = OURS | packaged_targets()
BY_NAME: dict[Source, HfClass] = {found.name: found for found in (*CLASSES, *WRITTEN.values())}
BY_TYPE: dict[str, HfClass] = {found.model_type: found for found in CLASSES}
TARGETS: tuple[Target, ...] = tuple(WRITTEN)
NATIVE_TARGETS: tuple[Target, ...] = tuple(name for name, found in OURS.items() if not found.ships_code)


def weight_map(config: ModelConfig, target: Source) -> WeightMap:
    """Build the map between our names and those of `target`; the configuration must fit it (`explain_unfit`)."""
    return BY_NAME[target].weights(config)


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
    names = (*registered_mixers(config).values(), *([config.head] if config.head else []))
    variants = {name: options for name, options in config.variants.items() if name in names}
    used = {name: getattr(config.mixers, name) for name in names if name not in variants}
    unused: dict[str, Any] = {kind.section: None for kind in CORE if kind.symbol not in letters}
    sections = {"mixers": type(config.mixers)(**used), "variants": Variants(**variants)}
    return config.model_copy(update=unused | sections)


NO_LIMIT = (0.0, 1e30)  # of time steps: JSON cannot spell infinity


def model_config_from_huggingface(fields: Mapping[str, Any]) -> ModelConfig:
    """Build our configuration from the config.json of one of the classes that we read.

    `fields` is config.json with the class's defaults filled in. What config.json does not say (initialisation, loss
    weights) gets our defaults. Raises ValueError if the class uses something that our model does not have.
    """
    kind = fields.get("model_type")
    found = BY_TYPE.get(str(kind))
    if found is None:
        raise ValueError(f"config.json: model_type={kind} cannot be imported; use one of {', '.join(BY_TYPE)}")
    low, high = fields.get("time_step_limit") or NO_LIMIT
    if low > NO_LIMIT[0] or high < NO_LIMIT[1]:
        raise ValueError(f"config.json: time_step_limit={low, high} cannot be imported; our time steps have no limits")
    return found.read(fields)
