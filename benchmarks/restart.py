"""The time to recover from a killed rank, part by part: 2 nodes of 2 ranks, with what stays loaded and without, in one run.

How it works: `amfm launch` runs a synthetic task (`pip install ./examples/synthetic`) on two `hosts` of this machine, behind a
shell instead of ssh. The last rank is killed after a checkpoint, and the parts of the way back are read from outside, by what
every version leaves: the launcher's line about the failure, the folder of checkpoints, which rank 0 touches when all ranks have
joined, the event of the new start, when everything is built and loaded, and the next line of metrics. Variants take turns.
`--other` adds another checkout (`git worktree add`), such as one from before.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import psutil
import typer

from amfm.launch.arguments import JsonOption
from amfm.launch.bench.kernels import describe_hardware
from amfm.launch.console import print_json, print_rows, say
from benchmarks import ROOT
from benchmarks.command import main

RANKS_PER_NODE, NODES = 2, 2
KILLED_RANK = str(NODES * RANKS_PER_NODE - 1)
KILL_AFTER, STEPS = 12, 1_000_000
PARTS = ("failure known, ranks ended", "loaded and joined", "built and restored", "first step")
PATIENCE_SECONDS = 600.0
SETTINGS = [
    "train.micro_batch_size=16",
    f"train.steps={STEPS}",
    "train.checkpoint_every_steps=5",
    "train.validate_every_steps=1000000",
    "train.log_every_steps=1",
    "run.tensorboard=false",
]


def restart(
    *,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    other: Annotated[Path | None, typer.Option(metavar="CHECKOUT", help="Another checkout, timed in turns.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Time the parts of a recovery."""
    variants: dict[str, tuple[Path, list[str]]] = {
        "everything again": (ROOT, ["launch.warm_restarts=false"]),
        "kept loaded": (ROOT, []),
    }
    if other is not None:
        if not (other / "src/amfm").is_dir():
            raise ValueError(f"{other} is not a checkout of amfm: it has no src/amfm; give a folder of `git worktree`")
        variants = {"the other checkout": (other.resolve(), []), **variants}
    found: dict[str, list[list[float]]] = {name: [] for name in variants}
    for number in range(rounds):
        for name, (checkout, settings) in variants.items():
            say(f"round {number + 1} of {rounds}: {name}")
            found[name].append(time_recovery(checkout, settings, port=29_700 + 40 * number))
    medians = {name: [statistics.median(part) for part in zip(*parts)] for name, parts in found.items()}
    if as_json:
        print_json({"hardware": describe_hardware(), "parts": PARTS, "rounds": found, "medians": medians})
        return
    rows = [
        (part, *(f"{seconds[place]:.1f}" for seconds in medians.values())) for place, part in enumerate((*PARTS, "all"))
    ]
    print_rows("Seconds to recover, medians", ("part", *medians), rows)


def time_recovery(checkout: Path, settings: list[str], port: int) -> list[float]:
    """Start a run, kill its last rank after a checkpoint, and time each part of the way to the next step, and all of it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shell, hosts = folder / "shell", folder / "hosts"
        shell.write_text('#!/bin/sh\nshift\nexec sh -c "$1"\n')
        shell.chmod(0o755)
        hosts.write_text("localhost\n127.0.0.1\n")
        words = [str(ROOT / "configs/probes/mqar.yaml"), f"run.dir={folder}/run", *SETTINGS, *settings]
        options = ["--on", "torchrun", "--nodes", str(NODES), "--nproc-per-node", str(RANKS_PER_NODE)]
        options += ["--hosts", str(hosts), "--remote-shell", str(shell), "--master", f"localhost:{port}"]
        log = folder / "log"
        with log.open("wb") as out:
            launcher = subprocess.Popen(
                [sys.executable, "-P", "-m", "amfm.launch", "launch", *words, *options],
                env=os.environ | {"PYTHONPATH": str(checkout / "src")},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
            )
        try:
            return follow_recovery(launcher, folder / "run", log)
        finally:
            launcher.terminate()
            launcher.wait()


def follow_recovery(launcher: subprocess.Popen[bytes], run_dir: Path, log: Path) -> list[float]:
    """Kill the rank, and note when each sign of the way back is there."""

    def await_(sign: Callable[[], bool]) -> float:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not sign():
            if time.monotonic() > deadline or launcher.poll() is not None:
                raise RuntimeError(f"the run did not continue: {log.read_text(errors='replace')[-3000:]}")
            time.sleep(0.01)
        return time.monotonic()

    def lines_of(name: str, text: str) -> int:
        path = run_dir / name
        return path.read_text().count(text) if path.exists() else 0

    await_(lambda: lines_of("metrics.jsonl", "\n") >= KILL_AFTER)
    find_rank(launcher.pid, KILLED_RANK).kill()
    times = [time.monotonic(), await_(lambda: "attempt 0 failed" in log.read_text(errors="replace"))]
    touched = (run_dir / "checkpoints").stat().st_mtime_ns
    times.append(await_(lambda: (run_dir / "checkpoints").stat().st_mtime_ns != touched))
    times.append(await_(lambda: lines_of("events.jsonl", '"restarted"') > 0))
    size = (run_dir / "metrics.jsonl").stat().st_size
    times.append(await_(lambda: (run_dir / "metrics.jsonl").stat().st_size > size))
    return [*(after - before for before, after in pairwise(times)), times[-1] - times[0]]


def find_rank(pid: int, rank: str) -> psutil.Process:
    """The process of a rank below the launcher: named, if it was forked, else by its variables."""
    for process in psutil.Process(pid).children(recursive=True):
        is_own = "amfm.launch" in process.cmdline() and process.environ().get("RANK") == rank
        if process.name() == f"amfm-rank-{rank}" or is_own:
            return process
    raise RuntimeError(f"no rank {rank} below process {pid}")


if __name__ == "__main__":
    main(restart)
