"""What `train.inspect_every_steps` costs a run: steps that are inspected vs. steps that are not, in turns.

How it works: one real run in rounds of four steps, of which the first is inspected. Times are processor seconds of the process,
in which other programs on the machine count little. A run that inspects every N steps pays an Nth of the difference.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer

from amfm.launch.arguments import JsonOption
from amfm.launch.console import print_json, print_pairs
from amfm.pretrain.hooks.inspection import Inspection
from benchmarks import ROOT
from benchmarks.command import main
from benchmarks.state_check import measure

EVERY = 10


def inspection(
    config: Annotated[Path, typer.Argument(help="A run whose data is prepared.")] = ROOT / "configs/tiny_cpu.yaml",
    overrides: Annotated[list[str] | None, typer.Argument(help="KEY=VALUE of the configuration.")] = None,
    *,
    rounds: Annotated[int, typer.Option(min=1)] = 12,
    as_json: JsonOption = False,
) -> None:
    """Measure what an inspected step costs, in steps, and a run that inspects every tenth."""
    with tempfile.TemporaryDirectory() as folder:
        settings = [f"run.dir={folder}/run", "run.tensorboard=false", "train.inspect_every_steps=1"]
        words = [str(config), *(overrides or []), *settings]
        seconds = measure(words, rounds, Inspection, time.process_time)
    plain = statistics.median([value for place in seconds[1:] for value in place])
    costs = [inspected / statistics.fmean(others) - 1 for inspected, *others in zip(*seconds)]
    cost = statistics.median(costs)
    found = {"plain_step_seconds": plain, "inspected_step_costs": cost, f"every_{EVERY}_steps_cost": cost / EVERY}
    if as_json:
        print_json(found)
    else:
        print_pairs("Inspection of a step", [(name, f"{value:.3g}") for name, value in found.items()])


if __name__ == "__main__":
    main(inspection)
