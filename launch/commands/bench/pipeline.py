"""`amfm bench pipeline`: ranks are started, and the main one prints how long steps take under each schedule."""

from __future__ import annotations

import os
import statistics
from typing import Annotated

import typer

from amfm.launch.arguments import JsonOption, OverridesArgument
from amfm.launch.console import print_json, print_rows, say


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
    from amfm.launch.bench.pipeline import bench_pipeline, load_stages

    given = overrides or []
    stages = int(os.environ.get("WORLD_SIZE", nproc))
    if stages == 1:
        raise ValueError("--nproc 1: a pipeline has two stages at least; use --nproc 2")
    config = load_stages(given, stages)
    if "WORLD_SIZE" not in os.environ:
        from amfm.launch.cluster.local import run_local

        flags = ["--rounds", str(rounds), *(["--json"] if as_json else [])]
        raise typer.Exit(run_local(["bench", "pipeline", *flags, *given], nproc))
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
    title = f"Seconds of a step, {result['stages']} stages, {result['micro_batches']} micro-batches, {rounds} rounds"
    print_rows(title, ("schedule", "median", "lowest", "highest"), rows)
    ratio = result["ratio"]
    say(
        f"zero_bubble takes {ratio['median']:.3f} of 1f1b's time by the median of rounds "
        f"({ratio['lowest']:.3f} to {ratio['highest']:.3f})"
    )
