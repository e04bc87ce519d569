"""Rules of pruning, forgetting and hooks: groups that the model has and can lose, in whole numbers, in steps of the run."""

from __future__ import annotations

from collections.abc import Iterator

from amfm.model.config.schema import ModelConfig
from amfm.model.config.structure import DENSE
from amfm.pretrain.checks.parallel import pattern_letters
from amfm.pretrain.config.errors import Problem
from amfm.pretrain.config.hook_registry import hook_specs
from amfm.pretrain.config.pruning import PruneConfig
from amfm.pretrain.config.schema import RunConfig


def editing_problems(config: RunConfig, steps: int) -> Iterator[Problem]:
    """Find what is wrong with `prune` and `forget`; `steps` are those of the whole run."""
    prune, forget = config.prune, config.forget
    if prune is not None:
        if prune.start_step >= prune.end_step:
            rule = f"must be less than prune.end_step={prune.end_step}"
            yield Problem("prune.start_step", rule, "lower it", str(prune.start_step))
        if prune.end_step > steps:
            yield Problem("prune.end_step", f"is beyond the {steps} steps of the run", "lower it", str(prune.end_step))
        if config.model.num_depths:
            rule = "takes groups out of main blocks alone, and model.pattern has prediction depths of the same sizes"
            yield Problem("prune", rule, "prune first, and train depths after")
        yield from group_problems(config, prune)
    if forget is not None:
        if forget.every_steps > forget.until_step:
            rule = f"is more than forget.until_step={forget.until_step}, so nothing is ever forgotten"
            yield Problem("forget.every_steps", rule, "lower it, or remove the section", str(forget.every_steps))
        if forget.until_step >= steps:
            rule = (
                f"must be less than the {steps} steps of the run, or it ends with an embedding that has learnt nothing"
            )
            yield Problem("forget.until_step", rule, "lower it", str(forget.until_step))


def hook_problems(config: RunConfig, steps: int) -> Iterator[Problem]:
    """Find what installed hooks say against their options; `steps` are those of the whole run."""
    for name in hook_specs():
        options = getattr(config.hooks, name)
        for field, rule, remedy in () if options is None else options.broken_rules(config, steps):
            yield Problem(f"hooks.{name}.{field}", rule, remedy, str(getattr(options, field)))


def group_problems(config: RunConfig, prune: PruneConfig) -> Iterator[Problem]:
    """Find groups that the model does not have, cannot lose, or not in that number."""
    model, letters = config.model, pattern_letters(config)
    sizes = group_sizes(model, letters, prune)
    if not sizes:
        what = {
            "channels": "no - block and no shared expert",
            "experts": "no E block",
            "heads": "no * block",
        }[prune.groups]
        yield Problem("prune.groups", f"has nothing to work on: model.pattern has {what}", "remove it", prune.groups)
    for name, size in sizes.items():
        kept = prune.keep * size
        if abs(kept - round(kept)) > 1e-6 or round(kept) < 1:
            number = max(1, round(kept))
            yield Problem(
                "prune.keep", f"of {name}={size} is no whole number", f"use {number / size:.6g}", str(prune.keep)
            )
    if prune.groups == "channels":
        forms = {}
        if model.feed_forward is not None and "-" in letters:
            forms["model.feed_forward"] = model.feed_forward.structure()
        if model.moe is not None and "E" in letters:
            forms["model.moe.shared_expert"] = model.moe.shared_structure()
        for key, structure in forms.items():
            if structure != DENSE:
                rule = f"needs dense matrices, and {key} has {structure.kind} ones, whose channels lie in blocks"
                yield Problem("prune.groups", rule, "prune another kind of group, or use dense", prune.groups)
    if prune.groups == "experts" and model.moe is not None and "E" in letters:
        moe = model.moe
        if not moe.expert_bias:
            rule = "needs model.moe.expert_bias=true (with router: sigmoid): a router without a bias would still choose them"
            yield Problem("prune.groups", rule, "set it", "experts")
        if moe.num_router_groups > 1:
            rule = f"does not go with model.moe.num_router_groups={moe.num_router_groups}: groups must stay of one size"
            yield Problem("prune.groups", rule, "use 1", "experts")
        if moe.overflow == "recycle":
            rule = "does not go with model.moe.overflow=recycle, which sends tokens to any expert with room"
            yield Problem("prune.groups", rule, "use overflow: drop", "experts")
        if round(prune.keep * moe.num_experts) < moe.top_k:
            rule = f"of model.moe.num_experts={moe.num_experts} leaves fewer than model.moe.top_k={moe.top_k}"
            yield Problem("prune.keep", rule, f"use at least {moe.top_k / moe.num_experts:.6g}", str(prune.keep))


def group_sizes(model: ModelConfig, letters: set[str], prune: PruneConfig) -> dict[str, int]:
    """Numbers of groups of a block, by the setting that says them."""
    sizes: dict[str, int] = {}
    if prune.groups == "channels":
        if "-" in letters and model.feed_forward is not None:
            sizes["model.feed_forward.hidden_size"] = model.feed_forward.hidden_size
        if "E" in letters and model.moe is not None and model.moe.shared_expert_hidden_size:
            sizes["model.moe.shared_expert_hidden_size"] = model.moe.shared_expert_hidden_size
    if prune.groups == "experts" and "E" in letters and model.moe is not None:
        sizes["model.moe.num_experts"] = model.moe.num_experts
    if prune.groups == "heads" and "*" in letters and model.attention is not None:
        sizes["model.attention.num_kv_heads"] = model.attention.num_kv_heads
    return sizes
