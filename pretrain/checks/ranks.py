"""On how many ranks a stage runs, whether they can share it, and the nearest layout where they cannot.

Without layouts of stages there is one number of ranks and one answer. A stage that declares its own layout may need
another number: a launcher that continues on its own offers several (`choices`, the most first), and the stage takes the
most that its layout and batch can share. Ranks that no one restarts have one choice, and later stages must suit it too.
All of it is arithmetic on the configuration, so that a stage of next month is rejected before the first one starts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice, product

from amfm.pretrain.checks.parallel import layout_problems, micro_batch_problems, pipeline_problems, world_problems
from amfm.pretrain.checks.stages import declaring_stage, ramp_share_problems
from amfm.pretrain.config.errors import Problem
from amfm.pretrain.config.schema import ParallelConfig, RunConfig
from amfm.pretrain.recompute import recompute_problems
from amfm.pretrain.stages import RunStage

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
