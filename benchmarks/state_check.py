"""What `health.check_state_every_steps` costs a run: steps that are checked vs. steps that are not, in turns.

How it works: a real run on a synthetic task (`pip install ./examples/synthetic`), in rounds of four steps. The first is
checked (its first micro-batch is run twice, and the state compared after it), the second compares the state that has rested
since, the other two do nothing. So a check costs what the first two take over the last two, in steps; and it may come each
`cost / share` steps for a share of the run's time.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from amfm.launch.arguments import JsonOption
from amfm.launch.console import print_json, print_pairs
from amfm.pretrain.checks.load import load_checked
from amfm.pretrain.hooks.state_watch import StateWatchHook
from amfm.pretrain.monitor.signals import SignalWatch
from amfm.pretrain.start import close_run, start_run
from amfm.pretrain.step import train_step
from benchmarks import ROOT
from benchmarks.command import main

SHARE = 0.005
ROUND = 4  # checked, compared at rest, and two plain ones
NEVER = 10**9
WARM_STEPS = 4


def state_check(
    config: Annotated[Path, typer.Argument(help="A run on a synthetic task.")] = ROOT / "configs/probes/mqar.yaml",
    overrides: Annotated[list[str] | None, typer.Argument(help="KEY=VALUE of the configuration.")] = None,
    *,
    rounds: Annotated[int, typer.Option(min=1)] = 12,
    as_json: JsonOption = False,
) -> None:
    """Measure what a check costs, in steps."""
    with tempfile.TemporaryDirectory() as folder:
        settings = [f"run.dir={folder}/run", "run.tensorboard=false", "health.check_state_every_steps=1"]
        seconds = measure([str(config), *(overrides or []), *settings], rounds, StateWatchHook)
    plain = statistics.median([*seconds[2], *seconds[3]])
    cost = statistics.median(
        (checked + rested - third - fourth) / ((third + fourth) / 2) for checked, rested, third, fourth in zip(*seconds)
    )
    found = {"plain_step_seconds": plain, "check_steps": cost, "every_steps_for_half_a_percent": cost / SHARE}
    if as_json:
        print_json(found)
    else:
        print_pairs("A check of the state", [(name, f"{value:.3g}") for name, value in found.items()])


def measure(
    words: list[str], rounds: int, kind: type[Any], clock: Callable[[], float] = time.perf_counter
) -> list[list[float]]:
    """Seconds by a clock of the steps of each place in a round; in the first one the hook of this kind is due."""
    config = load_checked(Path(words[0]), [*words[1:], f"train.steps={WARM_STEPS + ROUND * rounds}"], world_size=[1])
    seconds: list[list[float]] = [[] for _ in range(ROUND)]
    with SignalWatch() as signals:
        run = start_run(config, signals)
        try:
            (hook,) = (hook for hook in run.hooks if isinstance(hook, kind))
            for step in range(WARM_STEPS + ROUND * rounds):
                place = (step - WARM_STEPS) % ROUND
                hook.every_steps = 1 if place == 0 else NEVER
                began = clock()
                result = train_step(run)
                hook.after_step(result)
                if step >= WARM_STEPS:
                    seconds[place].append(clock() - began)
        finally:
            close_run(run)
    return seconds


if __name__ == "__main__":
    main(state_check)
