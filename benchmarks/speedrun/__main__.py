"""`python -m benchmarks.speedrun`: the loss on held-out text that each way comes to in the same processor seconds.

How it works: the text is the Python sources of this installation, the tokenizer is trained on it, and all ways read the same
rows. Of a way with several rates a short run of each chooses. Runs are written to WORK/runs.json as they end; the command continues with those
that are missing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from amfm.data_pipeline.durable.files import write_file_atomically
from amfm.data_pipeline.prepare.prepare import prepare
from amfm.data_pipeline.prepare.sample_text import collect_python_sources
from amfm.launch.cluster.child import Child
from amfm.launch.console import print_rows, say
from amfm.pretrain.checks.load import load_checked
from benchmarks import ROOT
from benchmarks.command import describe_run, main
from benchmarks.speedrun.results import COLUMNS, Curve, draw, summarize
from benchmarks.speedrun.ways import COMPARED, WAYS

VOCAB_SIZE, TRAINING_BYTES = 2_048, 5_000_000  # of the tokenizer
SWEEP_SHARE = 1 / 6  # of the seconds, for each rate that is tried


def speedrun(
    *,
    budget_seconds: Annotated[float, typer.Option(min=1, help="Processor seconds of a run.")] = 3600,
    seeds: Annotated[int, typer.Option(min=1)] = 3,
    rows: Annotated[int, typer.Option(min=8, help="Sequences per step, of 256 tokens.")] = 16,
    threads: Annotated[int, typer.Option(min=1, help="Of a run.")] = 2,
    ways: Annotated[str, typer.Option(help=f"Comma-separated, of {', '.join(WAYS)}.")] = ",".join(COMPARED),
    sweep: Annotated[bool, typer.Option(help="Choose among rates by short runs; else the middle one.")] = True,
    megabytes: Annotated[int, typer.Option(min=2, help="Text.")] = 120,
    config: Annotated[Path, typer.Option(help="Of our model.")] = ROOT / "configs/tiny_cpu.yaml",
    work: Annotated[Path, typer.Option(help="Folder of text, store and runs.")] = Path("data/speedrun"),
    out: Annotated[Path | None, typer.Option(help="Write OUT.json and OUT.png.")] = None,
) -> None:
    """Learn the same text by all ways and print bits per byte at the end, with the spread of the seeds."""
    names = ways.split(",")
    if unknown := [name for name in names if name not in WAYS]:
        raise ValueError(f"--ways {unknown[0]!r} must be among {', '.join(WAYS)}")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)  # not after hours
    overrides = prepare_text(config, work.absolute(), megabytes)
    task = {"config": str(config.absolute()), "rows": rows, "overrides": [*overrides, f"train.num_threads={threads}"]}
    runs = Runs(work / "runs.json", task)
    curves = [
        Curve.of(name, rate, [runs.get(name, rate, seed, budget_seconds * WAYS[name].share) for seed in range(seeds)])
        for name in names
        for rate in [choose_rate(runs, name, budget_seconds if sweep else None)]
    ]
    table = summarize(curves)
    print_rows(f"Bits per byte after {budget_seconds:,.0f} processor seconds, {seeds} seeds", COLUMNS, table)
    if out is not None:
        facts = {"run": describe_run(), "budget_seconds": budget_seconds, "rows": rows, "threads": threads}
        found = {**facts, "megabytes": megabytes, "ways": [vars(curve) for curve in curves]}
        write_file_atomically(out.with_suffix(".json"), (json.dumps(found, indent=1) + "\n").encode())
        draw([curve for curve in curves if curve.name in COMPARED], out.with_suffix(".png"))


def prepare_text(config: Path, work: Path, megabytes: int) -> list[str]:
    """Collect and tokenize the text, which a second call finds; returns overrides that read it."""
    collect_python_sources(work / "text", megabytes)
    overrides = [
        f"data.store={work / 'store'}",
        f"data.sources=[{{name: python, paths: [{work / 'text'}]}}]",
        "data.validation_fraction=0.02",
        f"data.tokenizer={{vocab_size: {VOCAB_SIZE}, training_bytes: {TRAINING_BYTES}}}",
    ]
    prepare(load_checked(config, overrides, world_size=1).data)
    return overrides


def choose_rate(runs: Runs, name: str, seconds: float | None) -> float:
    """The rate of a way: of several the one whose short run ends lowest, the middle one without seconds for that."""
    rates = WAYS[name].rates
    if len(rates) == 1 or seconds is None:
        return rates[len(rates) // 2]
    ends = {rate: runs.get(name, rate, 0, seconds * SWEEP_SHARE)["points"][-1][1] for rate in rates}
    say(f"{name}: " + ", ".join(f"rate {rate:g} ends at {end:.3f}" for rate, end in ends.items()))
    return min(ends, key=lambda rate: ends[rate])


class Runs:
    """Runs that are done, kept in a file, and those that are asked for."""

    def __init__(self, path: Path, task: dict[str, Any]) -> None:
        self.path, self.task = path, task
        self.done: dict[str, Any] = json.loads(path.read_bytes()) if path.is_file() else {}

    def get(self, way: str, rate: float, seed: int, seconds: float) -> dict[str, Any]:
        """Result of a run: `points` of seconds and bits per byte, steps, tokens, active parameters, precision."""
        task = {**self.task, "way": way, "rate": rate, "seed": seed, "seconds": seconds}
        key = json.dumps(task, sort_keys=True)
        if key not in self.done:
            say(f"{way}: rate {rate:g}, seed {seed}, {seconds:,.0f} processor seconds")
            self.done[key] = learn_there(task)
            write_file_atomically(self.path, json.dumps(self.done).encode())
            say(f"  {self.done[key]['points'][-1][1]:.4f} bits per byte after {self.done[key]['steps']} steps")
        found: dict[str, Any] = self.done[key]
        return found


def learn_there(task: dict[str, Any]) -> dict[str, Any]:
    """Run a task in a process of its own."""
    points: list[Sequence[float]] = []
    with Child("benchmarks.speedrun.child", json.dumps(task), root=ROOT, quiet=True) as child:
        while "point" in (answer := child.receive()):
            points.append(answer["point"])
    return {**answer, "points": points}


if __name__ == "__main__":
    main(speedrun)
