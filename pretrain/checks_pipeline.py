"""Rules of a pipeline: blocks enough for its pieces, and micro-batches enough for its schedule."""

from __future__ import annotations

from collections.abc import Iterator

from model.stages import cut_pieces
from pretrain.config import ParallelConfig, RunConfig
from pretrain.config_errors import Problem


def pipeline_problems(config: RunConfig) -> Iterator[Problem]:
    """Rules that hold for any number of ranks; the model's own must hold."""
    section, train = config.parallel, config.train
    if section.pipeline == 1:
        return
    try:
        cut_pieces(config.model, section.num_pieces(), train.sequence_length)
    except ValueError as error:
        yield Problem("parallel.pipeline", str(error), "")
    if section.schedule == "zero_bubble" and train.compile:
        rule = "does not go with parallel.schedule=zero_bubble, which cuts backward passes in two: compiled blocks have one"
        yield Problem("train.compile", rule, "use false, or another schedule", "true")


def micro_batch_problems(config: RunConfig, world_size: int) -> Iterator[Problem]:
    """A schedule needs micro-batches to fill the pipeline, in each batch of a ramp too.

    `pretrain.checks.batch_problems` must have found none.
    """
    section, train = config.parallel, config.train
    if section.pipeline == 1:
        return
    unit = train.micro_batch_size * section.data_ranks(world_size)
    sizes = {"train.global_batch_size": train.global_batch_size}
    if train.batch_ramp is not None:
        sizes["train.batch_ramp.start_size"] = train.batch_ramp.start_size
        if section.schedule != "1f1b":
            sizes["train.batch_ramp.increment"] = train.batch_ramp.increment
    for key, size in sizes.items():
        yield from fill_problems(section, key, size, unit)


def fill_problems(section: ParallelConfig, key: str, size: int, unit: int) -> Iterator[Problem]:
    """The rule of the schedule for `size` rows, of which all data ranks take `unit` at a time."""
    number = size // unit
    given = f"gives each data rank {number} micro-batch{'es' if number > 1 else ''}, and parallel.schedule={section.schedule}"
    if section.schedule == "1f1b" and number < section.pipeline:
        rule = f"{given} needs at least parallel.pipeline={section.pipeline} to fill the pipeline"
        remedy = f"use {section.pipeline * unit} or more, or a smaller train.micro_batch_size"
        yield Problem(key, rule, remedy, str(size))
    elif section.schedule != "1f1b" and number % section.pipeline:
        rule = f"{given} takes them in rounds of parallel.pipeline={section.pipeline}"
        rounds = (number // section.pipeline, number // section.pipeline + 1)
        nearest = " or ".join(str(each * section.pipeline * unit) for each in rounds if each)
        yield Problem(key, rule, f"use {nearest}", str(size))
