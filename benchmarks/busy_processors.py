"""Pace of training on a CPU on its own, next to one busy program, and of two at once, by how threads wait, in turns.

How it works: each way is `amfm train` of a prepared config in a process of its own, and its pace is the median of tokens per second
over the steps after the first five. The ways are OMP_WAIT_POLICY and GOMP_SPINCOUNT as the environment has them, and what
`amfm train` chooses itself. Only on a machine that does nothing else.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Annotated

import typer

from amfm.launch.arguments import JsonOption
from amfm.launch.bench.kernels import describe_hardware
from amfm.launch.console import print_json, print_rows, say
from benchmarks import ROOT
from benchmarks.command import main

BY_HAND = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
WAYS: dict[str, dict[str, str]] = {
    "spin": {"GOMP_SPINCOUNT": "300000"},  # OpenMP's own number
    "spin 20,000": {"GOMP_SPINCOUNT": "20000"},
    "spin 2,000": {"GOMP_SPINCOUNT": "2000"},
    "sleep": {"OMP_WAIT_POLICY": "passive"},
    "chosen by amfm": {},
}
WHERE = ("alone", "next to one", "each of two")
WARM = 5


def busy_processors(
    *,
    config: Annotated[Path, typer.Option(metavar="CONFIG.yaml", help="What is trained.")] = ROOT
    / "configs/tiny_cpu.yaml",
    steps: Annotated[int, typer.Option(min=WARM + 1)] = 20,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    ways: Annotated[list[str] | None, typer.Option("--way", help="Only these, by name.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Time training next to other programs."""
    chosen = ways or list(WAYS)
    pace: dict[tuple[str, str], list[float]] = {}
    for _ in range(rounds):
        for way in chosen:
            pace.setdefault((way, "alone"), []).extend(train([way], config, steps))
            with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as other:
                pace.setdefault((way, "next to one"), []).extend(train([way], config, steps))
                other.kill()
            pace.setdefault((way, "each of two"), []).extend(train([way, way], config, steps))
            say(", ".join(f"{where} {pace[way, where][-1]:,.0f}" for where in WHERE) + f" tokens/s, threads: {way}")
    rows = [
        {
            "threads": way,
            "where": where,
            "tokens_per_second": round(median(values)),
            "least": round(min(values)),
            "most": round(max(values)),
            "of_alone": round(median(values) / median(pace[way, "alone"]), 2),
            "of_spinning_alone": round(median(values) / median(pace[chosen[0], "alone"]), 2),
        }
        for (way, where), values in pace.items()
    ]
    if as_json:
        print_json({"hardware": describe_hardware(), "rounds": rounds, "steps": steps, "rows": rows})
    else:
        print_rows("Busy processors", tuple(rows[0]), [[str(value) for value in row.values()] for row in rows])


def train(ways: list[str], config: Path, steps: int) -> list[float]:
    """Train at once, a process per way; the median tokens per second of each."""
    with tempfile.TemporaryDirectory() as folder:
        runs = [Path(folder) / str(number) for number in range(len(ways))]
        processes = [start(way, config, steps, run) for way, run in zip(ways, runs, strict=True)]
        for process in processes:
            _, errors = process.communicate()
            if process.returncode:
                raise RuntimeError(f"amfm train ended with {process.returncode}: {errors.decode()[-2000:]}")
        lines = [[json.loads(line) for line in (run / "metrics.jsonl").open()] for run in runs]
    return [median(line["tokens_per_second"] for line in of_run[WARM:]) for of_run in lines]


def start(way: str, config: Path, steps: int, run: Path) -> subprocess.Popen[bytes]:
    """Start one training."""
    settings = [
        f"train.steps={steps}",
        f"run.dir={run}",
        "train.log_every_steps=1",
        "train.validate_every_steps=1000000",
    ]
    variables = {name: value for name, value in os.environ.items() if name not in BY_HAND}
    return subprocess.Popen(
        [sys.executable, "-m", "amfm.launch", "train", str(config), *settings],
        env=variables | {"PYTHONPATH": str(ROOT / "src")} | WAYS[way],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip


if __name__ == "__main__":
    main(busy_processors)
