"""Checks of training stages: how they are declared, that each obeys what any run must obey, and on how many ranks it runs.

A stage may change sequence length, batch, rotary positions, schedule and layout, so nearly every rule of a run can be broken by just one
stage. Instead of writing each rule twice, a stage is turned into the configuration of a run that consists of it
(`RunStage.config`), the ordinary rules check that run, and each problem is moved back to the key where the stage declares
the value (`relocate`). Rules on the declaration itself come first: without them stages cannot be resolved.

On how many ranks a stage runs, whether they can share it, and the nearest layout where they cannot: without layouts of stages there is one number of ranks and one answer. A stage that declares its own layout may need
another number: a launcher that continues on its own offers several (`choices`, the most first), and the stage takes the
most that its layout and batch can share. Ranks that no one restarts have one choice, and later stages must suit it too.
All of it is arithmetic on the configuration, so that a stage of next month is rejected before the first one starts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice, product

from amfm.model.config.schema import has_indexer
from amfm.pretrain.checks.parallel import layout_problems, micro_batch_problems, pipeline_problems, world_problems
from amfm.pretrain.config.errors import Problem
from amfm.pretrain.config.schema import ParallelConfig, RunConfig, StageConfig
from amfm.pretrain.recompute import recompute_problems
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


TRIED_LAYOUTS = 3000


def rank_problems(config: RunConfig, world_size: int) -> list[Problem]:
    """Check that this many ranks can share a run without stages: its axes, its batch and its pipeline's micro-batches."""
    shares = [*world_problems(config, world_size), *batch_problems(config, world_size)]
    return shares or [*micro_batch_problems(config, world_size), *ramp_share_problems(config, world_size)]


def batch_problems(config: RunConfig, world_size: int) -> Iterator[Problem]:
    """Check that every data rank takes the same number of micro-batches of the global batch, whose unit is rows."""
    assert world_size > 0, f"world_size is {world_size}"
    train = config.train
    data_ranks = config.parallel.data_ranks(world_size)
    unit = train.micro_batch_size * data_ranks
    if train.global_batch_size % unit:
        below = train.global_batch_size // unit * unit
        nearest = " or ".join(str(value) for value in (below, below + unit) if value)
        rule = (
            f"must be a multiple of train.micro_batch_size={train.micro_batch_size} x {data_ranks} data rank"
            f"{'s' if data_ranks > 1 else ''} = {unit}"
        )
        yield Problem("train.global_batch_size", rule, f"use {nearest}", str(train.global_batch_size))


def ranks_of_stage(config: RunConfig, stage: RunStage, choices: Sequence[int]) -> int:
    """Number of ranks that a stage runs on: the first choice, or the first that its own layout can use.

    If none suits it is the first choice, whose problems say why.
    """
    run = stage.config
    if declaring_stage(config, stage.index, "parallel") is not None:
        for number in choices:
            if not rank_problems(run, number):
                return number
    return choices[0]


def with_nearest(found: list[Problem], config: RunConfig, stage: RunStage, ranks: int) -> list[Problem]:
    """Name the nearest layout in the first problem about a layout that the stage declares, if there is one."""
    place = next((place for place, problem in enumerate(found) if problem.key.startswith("parallel")), None)
    if place is None or declaring_stage(config, stage.index, "parallel") is None:
        return found
    nearest = nearest_layout(stage.config, ranks)
    if nearest is None:
        return found
    remedy = f"the nearest layout for {ranks} ranks is {describe_parallel(nearest)}"
    remedy = f"{found[place].remedy}; {remedy}" if found[place].remedy else remedy
    return [*found[:place], replace(found[place], remedy=remedy), *found[place + 1 :]]


def nearest_layout(config: RunConfig, ranks: int) -> ParallelConfig | None:
    """Layout that this many ranks can run and whose axes are nearest, in powers of two; None if none of many is.

    The configuration is a run without stages, with the layout that does not suit.
    """
    own = config.parallel
    sizes = [size for size in range(1, min(ranks, 256) + 1) if ranks % size == 0]
    axes = ("tensor", "context", "pipeline", "expert")
    candidates = sorted(
        product(sizes, repeat=len(axes)),
        key=lambda values: sum(abs(math.log2(size / getattr(own, axis))) for axis, size in zip(axes, values)),
    )
    for values in islice(candidates, TRIED_LAYOUTS):
        changed: dict[str, int | float | str | None] = dict(zip(axes, values))
        if changed["tensor"] == 1:
            changed["sequence_parallel"] = False
        if changed["expert"] != own.expert:
            changed["expert_tensor"] = None
        if changed["expert"] == 1:
            changed |= {"overlap_experts": False, "expert_buffer_factor": None}
        if changed["pipeline"] == 1:
            changed |= {"schedule": "1f1b", "virtual_stages": 1}
        section = own.model_copy(update=changed)
        run = config.model_copy(update={"parallel": section})
        rules = [*layout_problems(run), *recompute_problems(run), *rank_problems(run, ranks)]
        if not rules and not any(pipeline_problems(run)):
            return section
    return None


def describe_parallel(section: ParallelConfig) -> str:
    """A layout as a YAML mapping of what is not at its default."""
    settings = section.model_dump(mode="json", exclude_defaults=True)
    return "{" + ", ".join(f"{name}: {str(value).lower()}" for name, value in settings.items()) + "}"
