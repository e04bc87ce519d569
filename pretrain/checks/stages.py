"""Checks of training stages: how they are declared, and that each obeys what any run must obey.

A stage may change sequence length, batch, rotary positions, schedule and layout, so nearly every rule of a run can be broken by just one
stage. Instead of writing each rule twice, a stage is turned into the configuration of a run that consists of it
(`RunStage.config`), the ordinary rules check that run, and each problem is moved back to the key where the stage declares
the value (`relocate`). Rules on the declaration itself come first: without them stages cannot be resolved.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from amfm.model.config.schema import has_indexer
from amfm.pretrain.config.errors import Problem
from amfm.pretrain.config.schema import RunConfig, StageConfig
from amfm.pretrain.stages import RunStage

# What a stage without its own value takes from outside of the stages, and not from the stage before.
NOT_INHERITED = ("learning_rate", "schedule", "weights")
# What decides how a stage is on the ranks.
LAYOUT = ("parallel", "recompute", "recompute_blocks")


def declaration_problems(config: RunConfig) -> Iterator[Problem]:
    """Check what must hold before stages can be resolved: a length for each, different names, known sources.

    Without stages the run needs `train.steps`. `resolve_stages` may be called only when nothing is found here.
    """
    if not config.stages:
        if config.train.steps is None:
            yield Problem("train.steps", "is missing", "set train.steps, or declare stages with tokens")
        return
    names = [section.name for section in config.stages]
    sources = [source.name for source in config.data.sources]
    if config.data.phases:
        remedy = "give the stages their weights and sequence_length, and remove data.phases"
        yield Problem("data.phases", "has no effect together with stages, which set when data change", remedy)
    for index, section in enumerate(config.stages):
        key = f"stages.{index}"
        if section.name in names[:index]:
            rule = f"is also the name of stages.{names.index(section.name)}"
            yield Problem(f"{key}.name", rule, "give each stage its own name", section.name)
        # Either one gives the length of the stage; with both, one of them would be ignored.
        if (section.tokens is None) == (section.steps is None):
            rule = "has neither tokens nor steps" if section.tokens is None else "has both tokens and steps"
            yield Problem(key, rule, "give it one of them")
        if section.rope is not None and (config.model.attention is None or config.model.attention.positions == "none"):
            rule = "has no effect: model.attention.positions is none"
            yield Problem(f"{key}.rope", rule, "remove it, or use model.attention.positions=rope")
        if section.indexer is not None and not has_indexer(config.model):
            rule = "has no effect: no block of model.pattern has an indexer"
            yield Problem(f"{key}.indexer", rule, "remove it, or give attention or mla one", section.indexer)
        for name in section.weights or {}:
            if name not in sources and config.data.synthetic is None:
                rule = "is not a name of data.sources"
                yield Problem(f"{key}.weights.{name}", rule, f"use one of {', '.join(sources)}")


def ramp_problems(config: RunConfig, first: RunStage) -> Iterator[Problem]:
    """Check that the batch ramp leads in equal increments to the full batch of the first stage, and ends before the stage.

    Sizes are in rows. The fix names the increment nearest to the one given that does divide the way.
    """
    ramp = config.train.batch_ramp
    if ramp is None:
        return
    full = first.train.global_batch_size
    if ramp.start_size >= full:
        rule = f"must be less than the global batch of {full} rows"
        yield Problem("train.batch_ramp.start_size", rule, "lower it, or remove the ramp", str(ramp.start_size))
    elif (full - ramp.start_size) % ramp.increment:
        rule = f"must lead from {ramp.start_size} to {full} rows in whole additions"
        divisors = [size for size in range(1, full - ramp.start_size + 1) if (full - ramp.start_size) % size == 0]
        nearest = min(divisors, key=lambda size: abs(size - ramp.increment))
        yield Problem("train.batch_ramp.increment", rule, f"use {nearest}", str(ramp.increment))
    if ramp.steps >= first.num_steps:
        rule = f"must be less than the {first.num_steps} steps of the {'first stage' if config.stages else 'run'}"
        yield Problem("train.batch_ramp.steps", rule, "lower it", str(ramp.steps))


def ramp_share_problems(config: RunConfig, world_size: int) -> Iterator[Problem]:
    """Check that data ranks share every batch of the ramp evenly, not only the full one.

    It suffices that start and increment are multiples of micro-batch x data ranks: then every size between is one too.
    """
    ramp = config.train.batch_ramp
    if ramp is None:
        return
    unit = config.train.micro_batch_size * config.parallel.data_ranks(world_size)
    for name, value in (("start_size", ramp.start_size), ("increment", ramp.increment)):
        if value % unit:
            rule = f"must be a multiple of micro-batch x data ranks = {unit}"
            nearest = max(1, round(value / unit)) * unit
            yield Problem(f"train.batch_ramp.{name}", rule, f"use {nearest}", str(value))


def total_problems(config: RunConfig, total: int) -> Iterator[Problem]:
    """Check that a number of steps next to stages is their sum."""
    if config.stages and config.train.steps not in (None, total):
        rule = f"is not the sum of the stages, {total}"
        remedy = "remove it, or change the stages; for a short trial use train.stop_after_steps"
        yield Problem("train.steps", rule, remedy, str(config.train.steps))


def relocate(problem: Problem, config: RunConfig, stage: RunStage) -> Problem:
    """Move a problem to the key at which the stage declares the value, if it does, and name the stage.

    A problem whose setting no stage can declare keeps its key, and one whose value no stage declares too: it is then
    about every stage alike.
    """
    own_key = problem.key.removeprefix("train.").removeprefix("model.attention.").removeprefix("optimizer.")
    field = own_key.partition(".")[0]
    if not config.stages or field not in StageConfig.model_fields:
        return problem
    place = declaring_stage(config, stage.index, field)
    if place is None and field in LAYOUT:
        return problem
    key = problem.key if place is None else f"stages.{place}.{own_key}"
    return replace(problem, key=key, rule=f"in stage {stage.name}: {problem.rule}")


def declaring_stage(config: RunConfig, index: int, field: str) -> int | None:
    """Index of the stage whose value of a field the stage `index` has; None if it comes from outside of the stages."""
    first = index if field in NOT_INHERITED else 0
    declared = [getattr(section, field) is not None for section in config.stages]
    places = [place for place in range(first, min(index + 1, len(declared))) if declared[place]]
    return places[-1] if places else None
