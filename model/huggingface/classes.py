"""All classes of transformers that we read or write. The order of the native ones is the order in which `auto` tries them.

Classes of packages are written where they are asked for by name.

Which of them can hold a model exactly, and reasons why another one cannot: a class holds a configuration when the function from
tokens to logits is the same. Its rules, names, shapes and fields are in the file of its family.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from amfm.model.config.kinds import CORE, find_kind, kind_of
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
from amfm.model.huggingface.depths import explain_left_out
from amfm.model.huggingface.entries import WeightMap
from amfm.model.huggingface.fields import registered_mixers, unfit_rare_options
from amfm.model.huggingface.hf_class import ENTRY_POINTS, HfClass, HfTarget, Source, Target
from amfm.model.huggingface.plain.families import FAMILIES
from amfm.model.huggingface.plain.fields import plain_class
from amfm.model.huggingface.refusals import Refusal

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


def find_target(name: str) -> HfTarget:
    """Return the class of a target. Raises ValueError for an unknown one."""
    for found in WRITTEN.values():
        if found.name == name:
            return found
    raise ValueError(f"export target {name!r} is unknown; use auto, {', '.join(TARGETS)}")


def explain_unfit(config: ModelConfig, target: str) -> list[str]:
    """List every choice of `config` that `target` cannot hold, each as value, rule and fix; empty: it fits.

    `own` holds all but mixers of other packages, `auto` what `choose_target` finds. Raises ValueError for an unknown target.
    """
    if target == "auto":
        return []
    found = find_target(target)
    if config.lora_mixer is not None:
        return [
            "model.lora_mixer has low-rank updates that a router chooses among by token: no class holds them; convert without "
            "tune.routing, whose one update is merged into the weights"
        ]
    if config.head is not None and not (found.ships_code and find_kind(config.head).modeling):
        return [
            f"model.head={config.head} is a head of another package, which no class has, and no file of ours without the head's own form (Kind.modeling); train without it"
        ]
    rare = [] if found.ships_code else unfit_rare_options(config, target, found.holds)
    if config.norm_placement != "before" and not found.ships_code and "norm_placement" not in found.holds:
        rule = f"{target} norms what a block reads; use before, or target own"
        rare.append(f"model.norm_placement={config.norm_placement}: {rule}")
    if config.stream is not None and not found.ships_code:
        rare.append(f"model.{config.stream_name}: blocks of {target} read the sum of all outputs; use target own")
    if config.norm != "rmsnorm" and not found.ships_code:
        rare.append(f"model.norm={config.norm}: {target} has RMSNorms; use rmsnorm, or target own")
    return found.unfit(without_mup(config)) + rare


def choose_target(config: ModelConfig, family: str | None = None, tokenizer_kind: str | None = None) -> Target:
    """Choose the first native class that holds the configuration exactly, else `own`.

    family: model type of the released model that it continues, whose class comes first. tokenizer_kind: of a tokenizer that
    AutoTokenizer must give the ids of. Raises ValueError for a model with mixers
    of other packages, which none of them has.
    """
    reasons = unfit_for_all(config)
    if reasons:
        raise ValueError("; ".join(reasons))
    tried = sorted(NATIVE_TARGETS, key=lambda target: WRITTEN[target].model_type != family)
    if tokenizer_kind is not None:
        tried = [target for target in tried if not WRITTEN[target].unfit_tokenizer(tokenizer_kind)]
    return next((target for target in tried if not explain_unfit(config, target)), "own")


def unfit_for_all(config: ModelConfig) -> list[str]:
    """List why no target holds the configuration, in the words of `own`; empty if one does."""
    fits_native = any(not explain_unfit(config, target) for target in NATIVE_TARGETS)
    return [] if fits_native else explain_unfit(config, "own")


def left_out_depths(config: ModelConfig, target: Target) -> str | None:
    """Report why an export leaves the MTP layers out; None if it does not, or there are
    none.
    """
    return explain_left_out(config, WRITTEN[target])


def known_refusals(config: ModelConfig, target: Target, tokenizer_kind: str) -> list[Refusal]:
    """List what named programs reject of an export; empty: nothing is known. `tokenizer_kind`: sentencepiece or huggingface."""
    return WRITTEN[target].refusals(config, tokenizer_kind)


def unfit_tokenizer(target: str, kind: str) -> list[str]:
    """Why AutoTokenizer would not give the ids of a tokenizer of this kind (sentencepiece or huggingface)."""
    return [] if target == "auto" else find_target(target).unfit_tokenizer(kind)
