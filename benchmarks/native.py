"""Native code on a CPU next to PyTorch: Mamba2 between its projections, and a whole training step, in turns in one process.

How it works: a round runs each way once, and seconds are the process's own on its processors, with one thread: ratios hold
next to other programs. What is printed is the median of the rounds' ratios with the least and the largest one.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from amfm.data_pipeline.memory import keep_freed_memory
from amfm.kernels.cases import Inputs
from amfm.kernels.mamba2.case import mixer_problem
from amfm.launch.arguments import JsonOption
from amfm.launch.console import print_json, print_rows
from amfm.pretrain.checks.load import load_checked
from benchmarks import ROOT
from benchmarks.command import main
from benchmarks.small_steps import begin_ranks, build_for_steps, take_step

WAYS = ("torch", "native")
# Rows, tokens, heads, state: tiny_cpu, ladder_20m, a state of 128, one long row of many heads. Documents of a quarter of a row.
SHAPES = ((8, 256, 6, 32), (8, 1024, 8, 64), (2, 1024, 8, 128), (1, 2048, 24, 128))


def native(
    config: Annotated[Path, typer.Argument(help="Of the training step.")] = ROOT / "configs/tiny_cpu.yaml",
    overrides: Annotated[list[str] | None, typer.Argument(help="KEY=VALUE of the configuration.")] = None,
    *,
    rounds: Annotated[int, typer.Option(min=2)] = 9,
    as_json: JsonOption = False,
) -> None:
    """Measure how many times as fast native code is."""
    torch.set_num_threads(1)
    rows = [measure_operation(*shape, documents, rounds) for shape in SHAPES for documents in (False, True)]
    rows.append(measure_step(config, [*(overrides or []), "train.num_threads=1"], rounds))
    if as_json:
        print_json(rows)
        return
    columns = ("what", "torch (CPU ms)", "native (CPU ms)", "times as fast", "least to largest")
    shown = [
        (
            row["what"],
            *(f"{row[way]:.1f}" for way in WAYS),
            f"{row['ratio']:.2f}",
            f"{row['least']:.2f} to {row['most']:.2f}",
        )
        for row in rows
    ]
    print_rows("Native code, both passes", columns, shown)


def measure_operation(
    rows: int, tokens: int, heads: int, state: int, has_documents: bool, rounds: int
) -> dict[str, Any]:
    """Both passes of Mamba2 between its projections, with a second one that is too small to count."""
    torch.manual_seed(0)
    lengths = (tokens // 4,) * 4 if has_documents else ()
    problem = mixer_problem(
        Inputs(torch.device("cpu"), torch.float32),
        tokens,
        heads,
        model=16,
        state=state,
        rows=rows,
        lengths=lengths,
        whole=True,
    )

    def run(way: str) -> None:
        out = problem.run(problem.leaves, way)["out"]
        torch.autograd.grad(out, [*problem.leaves.values()], torch.ones_like(out))

    text = f"Mamba2, {problem.shape}{', documents' if has_documents else ''}"
    return {"what": text} | compare({way: partial(run, way) for way in WAYS}, rounds)


def measure_step(
    path: Path, overrides: list[str], rounds: int, *, setting: str = "kernels.backend", ways: Sequence[str] = WAYS
) -> dict[str, Any]:
    """A training step of a configuration, by models that differ in one setting, of which each way is a value."""
    configs = {way: load_checked(path, [*overrides, f"{setting}={way}"], world_size=1) for way in ways}
    parallel = begin_ranks(configs[ways[0]])
    keep_freed_memory()  # as a run does
    engines = {way: build_for_steps(config, parallel)[0] for way, config in configs.items()}
    steps = {way: partial(take_step, configs[way], parallel, engines[way], None) for way in ways}
    return {"what": f"training step of {path.stem}"} | compare(steps, rounds)


def compare(ways: Mapping[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Median CPU milliseconds of each way, and how many times as fast the second is than the first."""
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(rounds + 1):
        for way, run in ways.items():
            began = time.process_time()
            run()
            if number:  # the first one warms up
                seconds[way].append(time.process_time() - began)
    ratios = [first / second for first, second in zip(*seconds.values())]
    medians = {way: 1e3 * statistics.median(found) for way, found in seconds.items()}
    return medians | {"ratio": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}


if __name__ == "__main__":
    main(native)
