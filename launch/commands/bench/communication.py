"""`amfm bench communication`: ranks are started, and the main one prints what they sent."""

from __future__ import annotations

import os
from typing import Annotated, Any

import typer

from amfm.launch.arguments import JsonOption, OverridesArgument
from amfm.launch.console import print_json, print_rows, say


def communication(
    overrides: OverridesArgument = None,
    *,
    nproc: Annotated[int, typer.Option(min=1, help="Ranks on this machine.")] = 1,
    as_json: JsonOption = False,
) -> None:
    """Count what ranks send in a training step under the layout that KEY=VALUE give, beside what formulas say.

    Bytes of a small model's step by axis and collective. Fails where the two differ.
    """
    from amfm.launch.bench.communication import bench_comm, load_layout

    given = overrides or []
    world_size = nproc if nproc > 1 else int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        raise ValueError("this counts what ranks send each other, and there is one; add --nproc 2, say")
    config = load_layout(given, world_size)
    if nproc > 1:
        from amfm.launch.cluster.local import run_local

        raise typer.Exit(run_local(["bench", "communication", *(["--json"] if as_json else []), *given], nproc))
    result = bench_comm(config)
    if os.environ.get("RANK", "0") == "0":
        if as_json:
            print_json(result)
        else:
            print_comm_table(result)
    if not result["equal"]:
        raise RuntimeError("counted bytes and formula differ; launch/plan/exchanges.py is wrong about this layout")


def print_comm_table(result: dict[str, Any]) -> None:
    """Print the rows of `bench_comm` as a table."""
    rows = [
        (
            row["axis"],
            row["collective"],
            row["dtype"],
            f"{row['calls']:,}",
            f"{row['handed_bytes']:,}",
            f"{row['formula_bytes']:,}",
            f"{row['sent_bytes']:,}",
        )
        for row in result["rows"]
    ]
    columns = ("axis", "collective", "numbers", "calls", "bytes handed in", "by formula", "bytes sent")
    print_rows(f"A training step of {result['tokens_a_step']:,} tokens on {result['ranks']} ranks", columns, rows)
    if result["context"] is not None:
        ways = result["context"]
        say(
            f"one Mamba2 block, micro-batch and context group: passing states sends {ways['states']:,} bytes, exchanging "
            f"tokens for heads would send {ways['heads']:,}; rows of {ways['equal_length']:,} tokens make them equal"
        )
    say("counted and formula are equal" if result["equal"] else "counted and formula DIFFER")
