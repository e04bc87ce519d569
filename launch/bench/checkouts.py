"""This checkout's training step beside that of another one: `amfm bench step` of each, a process a turn.

Settings, weights and data of the step are those that each checkout has itself, so their first losses are compared. Turns
alternate in order, and a ratio is that of two neighbouring turns: a machine that drifts slows both.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parents[2]


def bench_checkouts(
    other: Path, *, pairs: int, rounds: int, num_threads: int | None, report: Callable[[str], None]
) -> dict[str, Any]:
    """Time our variants in both checkouts, `pairs` turns each of `rounds` steps; memory is treated as training does.

    `variants` by name: `seconds` here and there, a median a turn; `rate`, how many times as fast as there this checkout is,
    median of the pairs, with `rate_min` and `rate_max`; `first_losses`, `same_loss`. Raises ValueError for a folder that is no
    checkout, RuntimeError where a turn fails, with what it said.
    """
    if not (other / "launch" / "__main__.py").is_file():
        raise ValueError(
            f"{other} is no checkout of amfm: it has no launch/__main__.py; give a folder of `git worktree`"
        )
    taken: list[dict[str, dict[str, Any]]] = []
    for number in range(pairs):
        pair: dict[str, dict[str, Any]] = {}
        turns = (("here", HERE), ("there", other.resolve()))
        for name, folder in turns if number % 2 == 0 else reversed(turns):
            report(f"pair {number + 1} of {pairs}: {name}")
            pair[name] = _time_steps(folder, rounds, num_threads)
        taken.append(pair)
    variants = {name: _compare(name, taken) for name in taken[0]["there"]["variants"]}
    return {
        "other": str(other),
        "pairs": pairs,
        "rounds": rounds,
        "hardware": taken[0]["here"]["hardware"],
        "variants": variants,
    }


def _time_steps(folder: Path, rounds: int, num_threads: int | None) -> dict[str, Any]:
    """What `amfm bench step --json` of a checkout prints, run by this Python with its packages."""
    named = (folder / "src" / "amfm").is_dir()  # older ones have `launch` itself as a package
    root, module = (folder / "src", "amfm.launch") if named else (folder, "launch")
    command = [sys.executable, "-m", module, "bench", "step", "--rounds", str(rounds), "--json"]
    command += [] if num_threads is None else ["--threads", str(num_threads)]
    environment = os.environ | {"PYTHONPATH": str(root)}
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(f"`amfm bench step` failed in {folder}: {run.stderr.strip()[-2000:]}")
    found: dict[str, Any] = json.loads(run.stdout)
    return found


def _compare(name: str, taken: list[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """Seconds, rates and first losses of a variant over all pairs."""
    seconds = {side: [_as_trained(pair[side]["variants"][name]) for pair in taken] for side in ("here", "there")}
    rates = [there / here for here, there in zip(seconds["here"], seconds["there"], strict=True)]
    losses = {side: taken[0][side]["variants"][name]["first_loss"] for side in ("here", "there")}
    return {
        "seconds": seconds,
        "rate": statistics.median(rates),
        "rate_min": min(rates),
        "rate_max": max(rates),
        "first_losses": losses,
        "same_loss": losses["here"] == losses["there"],
    }


def _as_trained(variant: dict[str, Any]) -> float:
    """Median seconds of a step as training treats freed memory; the only treatment where there is one."""
    figures = variant["as_trained"] or next(iter(variant["memory"].values()))
    return float(figures["seconds"])
