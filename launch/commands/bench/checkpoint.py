"""`amfm bench checkpoint`: how long training waits for a save."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from amfm.launch.arguments import JsonOption
from amfm.launch.console import print_json, print_rows, say


def checkpoint(
    *,
    folder: Annotated[Path | None, typer.Option(help="A folder on the disk to measure; default: /tmp.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Timed saves of each variant, taking turns.")] = 5,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; default: all cores.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Time saving 234 MB of state: waiting for the disk, beside training, and torch's own checkpoints."""
    from amfm.launch.bench.checkpoint import bench_checkpoint

    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    result = bench_checkpoint(folder, rounds=rounds, num_threads=threads, report=say)
    if as_json:
        print_json(result)
    else:
        print_checkpoint_table(result)


def print_checkpoint_table(result: dict[str, Any]) -> None:
    """Print the variants of `bench_checkpoint` as a table, and the hardware."""
    rows = [
        (
            name,
            f"{figures['stall_seconds']:.3f}",
            f"{figures['ratio_to_blocking']:.1%}",
            f"{figures['first_stall_seconds']:.3f}",
            f"{figures['durable_seconds']:.3f}",
            f"{figures['step_beside_seconds']:.3f}" if figures["step_beside_seconds"] else "",
        )
        for name, figures in result["variants"].items()
    ]
    columns = ("variant", "training waits s", "of blocking", "first time s", "durable after s", "step meanwhile s")
    print_rows(f"Saving {result['bytes'] / 1e6:.0f} MB, medians of {result['rounds']} rounds", columns, rows)
    say(f"a step alone takes {result['step_alone_seconds']:.3f} s")
    say(", ".join(f"{name} {value}" for name, value in result["hardware"].items()))
