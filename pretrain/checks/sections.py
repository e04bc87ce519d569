"""Checks of the optimizer's kind: settings that it would not read, and what it does not go with.

Checks of a run that is a stage of a conversion: what frozen weights and stages cannot be combined with.
"""

from __future__ import annotations

from collections.abc import Iterator

from amfm.pretrain.config.errors import Problem
from amfm.pretrain.config.hook_registry import hook_specs
from amfm.pretrain.config.optimizers import optimizer_specs
from amfm.pretrain.config.rates import DecayFactors, RateFactors
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
