"""A training step in bf16 next to one in float32 on this processor, in turns in one process, by models with the same weights.

How it works: as `benchmarks.native`, with one thread and seconds of the process on its processors; each precision takes the
kernels that `kernels.backend: auto` gives it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from amfm.launch.arguments import JsonOption
from amfm.launch.console import print_json, print_rows
from benchmarks import ROOT
from benchmarks.command import main
from benchmarks.native import measure_step

WAYS = ("float32", "bf16")


def precision(
    configs: Annotated[list[Path] | None, typer.Argument(help="Of the steps; default: tiny_cpu.")] = None,
    *,
    rounds: Annotated[int, typer.Option(min=2)] = 9,
    as_json: JsonOption = False,
) -> None:
    """Measure how many times as fast steps in bf16 are."""
    torch.set_num_threads(1)
    paths = configs or [ROOT / "configs/tiny_cpu.yaml"]
    rows = [measure_step(path, ["train.num_threads=1"], rounds, setting="train.precision", ways=WAYS) for path in paths]
    if as_json:
        print_json(rows)
        return
    shown = [
        (row["what"], *(f"{row[way]:.0f}" for way in WAYS), f"{row['ratio']:.2f}", f"{row['least']:.2f} to {row['most']:.2f}")
        for row in rows
    ]  # fmt: skip
    columns = ("what", "float32 (CPU ms)", "bf16 (CPU ms)", "times as fast", "least to largest")
    print_rows("Precision of a step", columns, shown)


if __name__ == "__main__":
    main(precision)
