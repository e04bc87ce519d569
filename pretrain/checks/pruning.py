"""Rules of pruning, forgetting, QK-clip and hooks: groups that the model has and can lose, in integers, in steps of the run."""

from __future__ import annotations

import math
from collections.abc import Iterator

from amfm.model.config.structure import DENSE
from amfm.pretrain.checks.mixers import kinds_in_use
from amfm.pretrain.config.errors import Problem
from amfm.pretrain.config.hook_registry import hook_specs
from amfm.pretrain.config.hook_sections import PruneConfig
from amfm.pretrain.config.schema import RunConfig


def editing_problems(config: RunConfig, steps: int) -> Iterator[Problem]:
    """Find what is wrong with `prune`, `forget` and `qk_clip`; `steps` are those of the whole run."""
    prune, forget = config.prune, config.forget
    if prune is not None:
        if prune.start_step >= prune.end_step:
            rule = f"must be less than prune.end_step={prune.end_step}"
            yield Problem("prune.start_step", rule, "lower it", str(prune.start_step))
        if prune.end_step > steps:
            yield Problem("prune.end_step", f"is beyond the {steps} steps of the run", "lower it", str(prune.end_step))
        if config.model.num_depths:
            rule = "removes groups only from main blocks, and model.pattern has MTP layers of the same sizes"
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
    if config.qk_clip is not None:
        yield from qk_clip_problems(config, config.qk_clip.limit)


def qk_clip_problems(config: RunConfig, limit: float) -> Iterator[Problem]:
    """Find blocks whose scores QK-clip cannot bound, and what it would fight with."""
    answers = [(kind, options.qk_clip()) for kind, options in kinds_in_use(config.model)]
    if all(answer is None for _, answer in answers):
        rule = "has nothing to bound: no block of model.pattern has a softmax of queries and keys"
        yield Problem("qk_clip", rule, "remove it")
    for kind, answer in answers:
        if answer:
            yield Problem(
                "qk_clip", f"cannot bound the scores of {kind.symbol}: model.{kind.section} {answer}", "remove it"
            )
    lengths = [config.train.sequence_length, *(stage.sequence_length or 0 for stage in config.stages)]
    if limit <= math.log(max(lengths)):
        rule = f"is not above {math.log(max(lengths)):.3g}, the log-sum-exp of {max(lengths)} scores of 0"
        yield Problem("qk_clip.limit", rule, "raise it", str(limit))
    updates = config.model.lora_mixer
    if updates is not None and "q" in updates.targets:
        rule = "scales the queries' weights, and model.lora_mixer adds updates to queries that it does not scale"
        yield Problem("qk_clip", rule, "remove it, or q from model.lora_mixer.targets")
    if config.optimizer.state_dtype == "bf16":
        rule = "scales master weights by factors near 1, and bf16 master weights have no number between 0.996 and 1"
        yield Problem("qk_clip", rule, "remove it, or use optimizer.state_dtype=float32")


def hook_problems(config: RunConfig, steps: int) -> Iterator[Problem]:
    """Find what installed hooks say against their options; `steps` are those of the whole run."""
    for name in hook_specs():
        options = getattr(config.hooks, name)
        for field, rule, remedy in () if options is None else options.broken_rules(config, steps):
            yield Problem(f"hooks.{name}.{field}", rule, remedy, str(getattr(options, field)))


def group_problems(config: RunConfig, prune: PruneConfig) -> Iterator[Problem]:
    """Find groups that the model does not have, cannot lose, or not in that number."""
    found = 0
    for kind, options in kinds_in_use(config.model):
        groups = options.prunable(prune.groups)
        if groups is None:
            continue
        found += 1
        key, kept = f"model.{kind.section}", prune.keep * groups.count
        setting = f"{key}.{next(iter(groups.sizes))}={groups.count}"
        if abs(kept - round(kept)) > 1e-6 or round(kept) < 1:
            remedy = f"use {max(1, round(kept)) / groups.count:.6g}"
            yield Problem("prune.keep", f"of {setting} is not an integer", remedy, str(prune.keep))
        for part in options.feed_forwards():
            if prune.groups == "channels" and part.structure != DENSE:
                owner = f"{key}.{part.prefix}".rstrip("._")
                rule = f"needs dense matrices, and {owner} has {part.structure.kind} ones, whose channels are in blocks"
                yield Problem("prune.groups", rule, "prune another kind of group, or use dense", prune.groups)
        for rule, remedy in groups.refused:
            yield Problem("prune.groups", rule, remedy, prune.groups)
        least = 0 if groups.least is None else getattr(options, groups.least)
        if round(kept) < least:
            rule = f"of {setting} leaves fewer than {key}.{groups.least}={least}"
            yield Problem("prune.keep", rule, f"use at least {least / groups.count:.6g}", str(prune.keep))
    if not found:
        rule = f"has nothing to work on: model.pattern has no block with {prune.groups} that can go"
        yield Problem("prune.groups", rule, "remove it", prune.groups)
