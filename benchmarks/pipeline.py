"""Pipeline benchmark: steps of one model under 1F1B and under zero-bubble, in turns in one run.

How it works: both schedules run over the same stages, weights and micro-batches, and rank 0 takes the time that the
slowest rank needs for a step, so that a ratio of neighbours in time says what the cut of backward passes gains or costs.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Annotated, Any

import torch
import typer

from amfm.launch.arguments import JsonOption, OverridesArgument
from amfm.launch.console import print_json, print_rows, say
from amfm.pretrain.config.schema import RunConfig
from amfm.pretrain.pipeline import Pipeline
from benchmarks.command import main
from benchmarks.small_steps import begin_ranks, build_for_steps, load_small, take_step

SCHEDULES = ("1f1b", "zero_bubble")
# Large enough that products take most of the time, small enough for some seconds per step on a laptop.
SIZES = (
    "model.pattern=ME*-ME*-",
    "model.hidden_size=256",
    "model.mamba.head_dim=64",
    "model.attention.head_dim=32",
    "model.feed_forward.hidden_size=512",
    "model.moe.expert_hidden_size=256",
    "model.moe.shared_expert_hidden_size=256",
    "train.sequence_length=256",
    "train.micro_batch_size=1",
    "train.global_batch_size=8",
)


def load_stages(overrides: Sequence[str], stages: int) -> RunConfig:
    """Load the benchmark's model in as many pipeline stages as ranks, with overrides. Raises ConfigError with every problem."""
    layout = f"parallel.pipeline={stages}", "parallel.schedule=zero_bubble"
    return load_small((*SIZES, *layout, *overrides), stages)


def bench_pipeline(config: RunConfig, rounds: int) -> dict[str, Any]:
    """Seconds of a step under each schedule, round by round, and zero-bubble's over 1F1B's. Every rank must call this."""
    parallel = begin_ranks(config)
    engine, _ = build_for_steps(config, parallel)
    pipelines = {
        schedule: Pipeline(
            engine.module, config.parallel.model_copy(update={"schedule": schedule}), parallel, engine.take_gradient
        )
        for schedule in SCHEDULES
    }
    seconds: dict[str, list[float]] = {schedule: [] for schedule in SCHEDULES}
    for number in range(rounds + 1):
        for schedule in SCHEDULES if number % 2 else reversed(SCHEDULES):
            torch.distributed.barrier()
            start = time.perf_counter()
            take_step(config, parallel, engine, pipelines[schedule])
            slowest = max(parallel.gather_objects(time.perf_counter() - start))
            if number:  # the first step of each builds its schedule
                seconds[schedule].append(slowest)
    ratios = [cut / whole for whole, cut in zip(*seconds.values(), strict=True)]
    return {
        "stages": config.parallel.pipeline,
        "micro_batches": config.train.global_batch_size // config.train.micro_batch_size,
        "seconds": seconds,
        "ratio": {"median": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)},
    }


def pipeline(
    overrides: OverridesArgument = None,
    *,
    nproc: Annotated[int, typer.Option(min=1, help="Ranks on this machine, a pipeline stage each.")] = 2,
    rounds: Annotated[int, typer.Option(min=1, help="Timed steps of each schedule, taking turns.")] = 8,
    as_json: JsonOption = False,
) -> None:
    """Time steps of a small model under 1F1B and zero-bubble schedules, in turns: 8 micro-batches of 256 tokens.

    KEY=VALUE changes the model or the batch.
    """

    given = overrides or []
    stages = int(os.environ.get("WORLD_SIZE", nproc))
    if stages == 1:
        raise ValueError("--nproc 1: a pipeline has two stages at least; use --nproc 2")
    config = load_stages(given, stages)
    if "WORLD_SIZE" not in os.environ:
        from amfm.launch.cluster.local import run_command

        flags = ["--rounds", str(rounds), *(["--json"] if as_json else [])]
        raise typer.Exit(run_command([sys.executable, "-m", "benchmarks.pipeline", *flags, *given], nproc))
    result = bench_pipeline(config, rounds)
    if os.environ["RANK"] != "0":
        return
    if as_json:
        print_json(result)
        return
    rows = [
        (schedule, *(f"{value:.3f}" for value in (statistics.median(seconds), min(seconds), max(seconds))))
        for schedule, seconds in result["seconds"].items()
    ]
    title = f"Seconds per step, {result['stages']} stages, {result['micro_batches']} micro-batches, {rounds} rounds"
    print_rows(title, ("schedule", "median", "lowest", "highest"), rows)
    ratio = result["ratio"]
    say(
        f"zero_bubble takes {ratio['median']:.3f} of 1f1b's time by the median of rounds "
        f"({ratio['lowest']:.3f} to {ratio['highest']:.3f})"
    )


if __name__ == "__main__":
    main(pipeline)
