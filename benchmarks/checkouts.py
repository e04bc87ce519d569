"""This checkout's training step vs. that of another one: `python -m benchmarks.step` of each, a process a turn.

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
from typing import Annotated, Any

import typer

from amfm.launch.arguments import JsonOption
from amfm.launch.console import print_json, print_rows, say
from benchmarks import ROOT
from benchmarks.command import main

HERE = ROOT


def bench_checkouts(
    other: Path, *, pairs: int, rounds: int, num_threads: int | None, report: Callable[[str], None]
) -> dict[str, Any]:
    """Time our variants in both checkouts, `pairs` turns each of `rounds` steps; memory is treated as training does.

    `variants` by name: `seconds` here and there, a median a turn; `rate`, how many times as fast as there this checkout is,
    median of the pairs, with `rate_min` and `rate_max`; `first_losses`, `same_loss`. Raises ValueError for a folder
    that is not a checkout, RuntimeError if a turn fails, with what it said.
    """
    if not (other / "launch" / "__main__.py").is_file():
        raise ValueError(
            f"{other} is not a checkout of amfm: it has no launch/__main__.py; give a folder of `git worktree`"
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
    """What `python -m benchmarks.step --json` of a checkout prints, run by this Python with its packages."""
    source, words = find_step(folder)
    command = [sys.executable, "-m", *words, "--rounds", str(rounds), "--json"]
    command += [] if num_threads is None else ["--threads", str(num_threads)]
    environment = os.environ | {"PYTHONPATH": str(source)}
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(f"`{' '.join(words)}` failed in {folder}: {run.stderr.strip()[-2000:]}")
    found: dict[str, Any] = json.loads(run.stdout)
    return found


def find_step(folder: Path) -> tuple[Path, list[str]]:
    """Where a checkout's packages are found, and the module that times its step, with its verb in older ones."""
    if (folder / "benchmarks").is_dir():
        return folder / "src", ["benchmarks.step"]
    if (folder / "src" / "amfm").is_dir():
        return folder / "src", ["amfm.launch", "bench", "step"]
    return folder, ["launch", "bench", "step"]


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
    """Median seconds of a step as training treats freed memory; the only treatment if there is one."""
    figures = variant["as_trained"] or next(iter(variant["memory"].values()))
    return float(figures["seconds"])


def checkouts(
    other: Annotated[Path, typer.Argument(metavar="CHECKOUT", help="Folder of the other one (`git worktree add`).")],
    *,
    pairs: Annotated[int, typer.Option(min=1, help="Turns of each checkout, in changing order.")] = 4,
    rounds: Annotated[int, typer.Option(min=1, help="Timed steps a turn.")] = 4,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; default: all cores.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Time `python -m benchmarks.step` here and in another checkout in turns, and say how much faster or slower this one is.

    Both run with this Python and its packages.
    """

    result = bench_checkouts(other, pairs=pairs, rounds=rounds, num_threads=threads, report=say)
    if as_json:
        print_json(result)
    else:
        print_checkouts(result)


def print_checkouts(result: dict[str, Any]) -> None:
    """A line for each variant of `bench_checkouts`."""
    rows = []
    for name, figures in result["variants"].items():
        here, there = (", ".join(f"{each:.3f}" for each in figures["seconds"][side]) for side in ("here", "there"))
        rate = f"{figures['rate']:.3f} ({figures['rate_min']:.3f} to {figures['rate_max']:.3f})"
        first = figures["first_losses"]
        loss = f"{first['here']:.6f}" if figures["same_loss"] else f"{first['here']:.6f}, there {first['there']:.6f}"
        rows.append((name, here, there, rate, loss))
    columns = ("variant", "seconds here", f"seconds in {result['other']}", "times as fast here", "first loss")
    title = (
        f"A training step, {result['pairs']} pairs of turns of {result['rounds']} steps, memory as training treats it"
    )
    print_rows(title, columns, rows)
    say(", ".join(f"{name} {value}" for name, value in result["hardware"].items()))


if __name__ == "__main__":
    main(checkouts)
