"""Choice of the transformers class that can hold a model exactly, and reasons why another one cannot.

A class holds a configuration when the function from tokens to logits is the same. Its rules, names, shapes and fields are in
the file of its family.
"""

from __future__ import annotations

from amfm.model.config.kinds import find_kind
from amfm.model.config.mup import without_mup
from amfm.model.config.schema import ModelConfig
from amfm.model.huggingface.classes import NATIVE_TARGETS, TARGETS, WRITTEN
from amfm.model.huggingface.depths import explain_left_out
from amfm.model.huggingface.fields import unfit_rare_options
from amfm.model.huggingface.hf_class import HfTarget, Target
from amfm.model.huggingface.refusals import Refusal


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
