"""Checks of the optimizer's kind: settings that it would not read, and what it does not go with."""

from __future__ import annotations

from collections.abc import Iterator

from amfm.pretrain.config.errors import Problem
from amfm.pretrain.config.optimizers import optimizer_specs
from amfm.pretrain.config.rates import DecayFactors, RateFactors
from amfm.pretrain.config.schema import RunConfig


def optimizer_problems(config: RunConfig) -> Iterator[Problem]:
    """Refuse settings of another kind than the chosen one, Muon in the memory of the host, and what a kind does not go with."""
    section = config.optimizer
    if section.muon is not None and section.kind != "muon":
        rule = f"has settings of Muon, and optimizer.kind is {section.kind}"
        yield Problem("optimizer.muon", rule, "use optimizer.kind=muon, or remove the section")
    if section.kind == "muon" and config.parallel.offload_optimizer:
        rule = "would have the host's processors multiply Muon's matrices"
        yield Problem("parallel.offload_optimizer", rule, "use false, or optimizer.kind=adamw", "true")
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
    if "router" in given and config.model.moe is None:
        yield "router", "matches nothing: no block of model.pattern has a router"
    if "adamw" in given and config.optimizer.kind != "muon":
        yield "adamw", f"is for what Muon does not step, and optimizer.kind is {config.optimizer.kind}"


def _bf16_state_problems(config: RunConfig) -> Iterator[Problem]:
    """Refuse what bf16 masters and moments do not go with, each with its reason."""
    key, parallel = "optimizer.state_dtype", config.parallel
    if config.train.precision != "bf16":
        rule = f"keeps masters in bf16, and train.precision={config.train.precision} computes with float32 weights"
        yield Problem(key, rule, "use train.precision=bf16, or float32 states", "bf16")
    if config.optimizer.kind in optimizer_specs():
        rule = f"is AdamW's alone, and optimizer.kind is {config.optimizer.kind}"
        yield Problem(key, rule, "use optimizer.kind=adamw, or float32", "bf16")
    if config.optimizer.kind == "muon":
        rule = "is AdamW's alone: Muon would orthogonalise a momentum that was rounded, which has not been tried"
        yield Problem(key, rule, "use optimizer.kind=adamw, or float32", "bf16")
    if parallel.zero_stage == 0:
        rule = "is not for parallel.zero_stage=0, where DeepSpeed makes float32 masters whatever is asked"
        yield Problem(key, rule, "use parallel.zero_stage=1, which does on one rank too, or float32", "bf16")
    if parallel.offload_optimizer:
        rule = "is not for parallel.offload_optimizer: DeepSpeed keeps bf16 states on the host with its compiled AdamW alone"
        yield Problem(key, rule, "use parallel.offload_optimizer=false, or float32", "bf16")
