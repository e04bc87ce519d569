"""Checks of the optimizer's kind: settings that it would not read, and what it does not go with.

Checks of a run that is a stage of a conversion: what frozen weights and stages cannot be combined with.

Rules of pruning, forgetting, QK-clip and hooks: groups that the model has and can lose, in integers, in steps of the run.

Rules of distillation: layouts in which a teacher has not been shown to read what the model reads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from amfm.model.config.structure import DENSE
from amfm.pretrain.checks.blocks import kinds_in_use
from amfm.pretrain.config.errors import Problem
from amfm.pretrain.config.hook_registry import hook_specs
from amfm.pretrain.config.hook_sections import PruneConfig
from amfm.pretrain.config.optimizers import DecayFactors, RateFactors, optimizer_specs
from amfm.pretrain.config.schema import RunConfig

KEPT = "changes weights that stay as they are"


def routed_problems(config: RunConfig) -> Iterator[Problem]:
    """Reject what has not been shown to compute the same together with low-rank updates that a router chooses among."""
    if config.model.lora_mixer is None:
        return
    parallel = config.parallel
    refused = [
        ("train.compile", config.train.compile, "true", "use false"),
        ("parallel.zero_stage", parallel.zero_stage == 3, "3", "use 0, 1 or 2"),
        ("parallel.context", parallel.context > 1, str(parallel.context), "use 1"),
        ("parallel.pipeline", parallel.pipeline > 1, str(parallel.pipeline), "use 1"),
        ("prune", config.prune is not None, None, "prune the model before it gets updates"),
        ("model.mup", config.model.mup is not None, None, "remove it: rates of updates are not carried over widths"),
    ]
    for key, is_set, value, remedy in refused:
        if is_set:
            yield Problem(key, "is not built for the routed updates of model.lora_mixer", remedy, value)


def frozen_problems(config: RunConfig) -> Iterator[Problem]:
    """Reject layouts and edits that do not know weights which stay as they are: of a conversion, and of train.freeze."""
    parallel = config.parallel
    if parallel.zero_stage == 3:
        rule = "cuts frozen weights over ranks too, and a checkpoint would have to gather them"
        yield Problem("parallel.zero_stage", rule, "use 0, 1 or 2: frozen weights have no optimizer state", "3")
    if parallel.pipeline > 1 and parallel.schedule != "1f1b":
        rule = "computes gradients of weights apart, and frozen ones have none"
        yield Problem("parallel.schedule", rule, "use 1f1b", parallel.schedule)
    editing = {name: getattr(config, name) for name in ("prune", "forget", "qk_clip")}
    editing |= {"model.self_guided_training": config.model.self_guided_training}
    for key, value in editing.items():
        if value is not None:
            yield Problem(key, KEPT, "remove it, and train the result on with it")


def conversion_problems(config: RunConfig) -> Iterator[Problem]:
    """Reject a section `convert` in a run of training, and layouts that do not know weights which stay as they are."""
    if config.convert is None:
        if config.train.freeze:
            yield from frozen_problems(config)
        return
    if config.train.freeze:
        yield Problem("train.freeze", "has no place in a conversion, which freezes what it does not make", "remove it")
    if config.convert.stage is None:
        rule = "is a section of `amfm convert`, and this is a run of training"
        yield Problem("convert", rule, "run `amfm convert CONFIG`, or remove the section")
        return
    yield from frozen_problems(config)
    for name in hook_specs():
        if getattr(config.hooks, name) is not None:
            yield Problem(f"hooks.{name}", KEPT, "remove it, and train the result on with it")
    if config.optimizer.matrix_settings() is not None:
        rule = "makes the steps of matrices orthogonal, which has not been tried on the thin factors of an update"
        yield Problem("optimizer.kind", rule, "use adamw", config.optimizer.kind)
    if config.stages:
        yield Problem("stages", "have no place in a conversion, which has its own stages", "remove them")


def trace_problems(config: RunConfig) -> Iterator[Problem]:
    """Refuse to trace choices if there are none, and where no Python code runs in a pass."""
    if config.trace_choices is None:
        return
    if not config.model.routed_experts():
        yield Problem("trace_choices", "has nothing to write: no block of model.pattern has a router", "remove it")
    for key, is_set in (("compile", config.train.compile), ("cuda_graphs", config.train.cuda_graphs != "none")):
        if is_set:
            rule = f"reads choices in forward passes, which train.{key} runs without Python"
            yield Problem("trace_choices", rule, f"remove train.{key}, or trace a run without it")


def optimizer_problems(config: RunConfig) -> Iterator[Problem]:
    """Reject settings of another kind than the chosen one, Muon in the memory of the host, and what a kind does not go with."""
    section = config.optimizer
    if section.muon is not None and section.kind != "muon":
        rule = f"has settings of Muon, and optimizer.kind is {section.kind}"
        yield Problem("optimizer.muon", rule, "use optimizer.kind=muon, or remove the section")
    matrices = section.matrix_settings()
    if matrices is not None and config.parallel.offload_optimizer:
        rule = f"would have the host's processors multiply the matrices of optimizer.kind={section.kind}"
        yield Problem("parallel.offload_optimizer", rule, "use false, or optimizer.kind=adamw", "true")
    if matrices is not None and matrices.keeps_state_at_owners and config.prune is not None:
        rule = "sets the moments of pruned weights to zero, which an optimizer that keeps whole matrices has with their owners"
        yield Problem("prune", rule, "use optimizer.kind=adamw, or muon with optimizer.muon.rule=muon")
    if matrices is not None and matrices.keeps_norms and config.model.mup is not None:
        rule = "is for steps whose size it sets, and Hyperball's are a share of the weights' norm at every width"
        yield Problem("model.mup", rule, "remove it, or use optimizer.muon.rule=muon or normuon")
    for key, factors in (("rates", section.rates), ("decays", section.decays)):
        for name, rule in unmatched(factors, config) if factors is not None else ():
            yield Problem(f"optimizer.{key}.{name}", rule, "remove it", str(getattr(factors, name)))
    for name in section.options.packages_used():
        if name != section.kind:
            rule = f"has no effect with optimizer.kind={section.kind}"
            yield Problem(f"optimizer.options.{name}", rule, f"use optimizer.kind={name}, or remove it")
    if section.kind in optimizer_specs() and config.model.mup is not None:
        rule = f"scales the rates of AdamW and Muon, and optimizer.kind={section.kind} is neither"
        yield Problem("model.mup", rule, "use optimizer.kind=adamw or muon, or remove model.mup")
    if section.state_dtype == "bf16":
        yield from _bf16_state_problems(config)


def unmatched(factors: RateFactors | DecayFactors, config: RunConfig) -> Iterator[tuple[str, str]]:
    """Groups of factors that no parameter of the model is in: name and rule."""
    given = factors.model_fields_set
    if "head" in given and config.model.tie_embeddings:
        yield "head", "matches nothing: model.tie_embeddings makes the head the embedding, whose factor it has"
    if "router" in given and not config.model.expert_sections():
        yield "router", "matches nothing: no block of model.pattern has a router"
    matrices = config.optimizer.matrix_settings()
    if "adamw" in given and matrices is None:
        yield "adamw", f"is for weights that Muon does not step, and optimizer.kind is {config.optimizer.kind}"
    if isinstance(factors, DecayFactors) and "matrices" in given and matrices is not None and matrices.keeps_norms:
        yield "matrices", "has no effect: Hyperball keeps the norm of these and has no weight decay"


def _bf16_state_problems(config: RunConfig) -> Iterator[Problem]:
    """Reject what bf16 master weights and moments do not go with, each with its reason."""
    key, parallel = "optimizer.state_dtype", config.parallel
    if config.train.precision != "bf16":
        rule = f"keeps master weights in bf16, which needs train.precision=bf16; got {config.train.precision}"
        yield Problem(key, rule, "use train.precision=bf16, or float32 states", "bf16")
    if config.optimizer.kind in optimizer_specs():
        rule = f"is only for AdamW, and optimizer.kind is {config.optimizer.kind}"
        yield Problem(key, rule, "use optimizer.kind=adamw, or float32", "bf16")
    elif config.optimizer.matrix_settings() is not None:
        rule = "is only for AdamW: Muon would orthogonalise a momentum that was rounded, which has not been tried"
        yield Problem(key, rule, "use optimizer.kind=adamw, or float32", "bf16")
    if parallel.zero_stage == 0:
        rule = "is not for parallel.zero_stage=0, where DeepSpeed makes float32 master weights whatever is asked"
        yield Problem(key, rule, "use parallel.zero_stage=1, which does on one rank too, or float32", "bf16")
    if parallel.offload_optimizer:
        rule = "is not for parallel.offload_optimizer: DeepSpeed keeps bf16 states on the host only with its compiled AdamW"
        yield Problem(key, rule, "use parallel.offload_optimizer=false, or float32", "bf16")


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


def distill_problems(config: RunConfig) -> Iterator[Problem]:
    """Find what does not go with a section `distill`; the teacher itself is compared when it is read."""
    section = config.distill
    if section is None:
        return
    parallel = config.parallel
    layouts = [parallel, *(stage.parallel for stage in config.stages if stage.parallel is not None)]
    if section.store is not None and section.top_k is None:
        yield Problem(
            "distill.store", "holds the likeliest tokens alone", "set distill.top_k, such as 64", section.store
        )
    if any(each.pipeline > 1 for each in layouts):
        rule = (
            "is read whole by every rank, and with parallel.pipeline above 1 no rank reads the tokens and has the head"
        )
        yield Problem(
            "distill.teacher", rule, "use parallel.pipeline=1 with tensor, expert or ZeRO ranks", section.teacher
        )
    if section.store is None and any(each.expert_buffer_factor is not None for each in layouts):
        rule = "may have experts, whose rows would be counted as those of the model in parallel.expert_buffer_factor"
        yield Problem("distill.teacher", rule, "remove parallel.expert_buffer_factor", section.teacher)
    if config.convert is not None:
        rule = "has no place in a conversion, whose teacher is convert.teacher"
        yield Problem("distill", rule, "remove it, and distil the result")
    if config.model.head is not None:
        rule = f"compares logits, and the head {config.model.head} of a package computes its own probabilities"
        yield Problem("distill", rule, "remove it, or model.head")
    if section.top_k is not None and section.top_k >= config.model.vocab_size:
        rule = f"must be below model.vocab_size={config.model.vocab_size}"
        yield Problem("distill.top_k", rule, "lower it, or use null for all tokens", str(section.top_k))
