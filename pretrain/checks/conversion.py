"""Checks of a run that is a stage of a conversion: what frozen weights and stages cannot be combined with."""

from __future__ import annotations

from collections.abc import Iterator

from amfm.pretrain.config.errors import Problem
from amfm.pretrain.config.hook_registry import hook_specs
from amfm.pretrain.config.schema import RunConfig

KEPT = "changes weights that stay as they are"


def routed_problems(config: RunConfig) -> Iterator[Problem]:
    """Refuse what has not been shown to compute the same together with low-rank updates that a router chooses among."""
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
    """Refuse layouts and edits that do not know weights which stay as they are: of a conversion, and of train.freeze."""
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
    """Refuse a section `convert` in a run of training, and layouts that do not know weights which stay as they are."""
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
    if config.optimizer.kind == "muon":
        rule = "makes the steps of matrices orthogonal, which has not been tried on the thin factors of an update"
        yield Problem("optimizer.kind", rule, "use adamw", "muon")
    if config.stages:
        yield Problem("stages", "have no place in a conversion, which has its own stages", "remove them")
