"""`amfm bench length`: sequence mixers timed at row length after row length, and a table of which are flat."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from amfm.launch.arguments import JsonOption
from amfm.launch.console import print_json, print_rows, say

ROUNDS = 3


def length(
    *,
    mixers: Annotated[
        str | None, typer.Option(metavar="M,G,gla", help="Letters or names; default: all, and attention.")
    ] = None,
    lengths: Annotated[
        str | None, typer.Option(metavar="1024,16384", help="Tokens a row; a step holds the longest row's.")
    ] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Timed steps of each, taking turns; default: 3.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; default: one.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Time small models of one mixer each, the same tokens cut into longer and longer rows, and say which are flat.

    One thread where none is asked for, so that CPU time means something.
    """
    from amfm.launch.bench.length import bench_lengths, choose_lengths, choose_mixers

    symbols, chosen = choose_mixers(mixers), choose_lengths(lengths)
    result = bench_lengths(symbols, chosen, rounds=rounds or ROUNDS, num_threads=threads or 1, report=say)
    if as_json:
        print_json(result)
    else:
        print_length_table(result)


def print_length_table(result: dict[str, Any]) -> None:
    """Print a line for each mixer of `bench_lengths`: tokens a second at the shortest rows, then ratios to it."""
    rows = []
    for name, figures in result["mixers"].items():
        shortest, *longer = figures["rows"]
        ratios = [f"{row['ratio']:.2f} ({row['ratio_min']:.2f} to {row['ratio_max']:.2f})" for row in longer]
        mark = (
            figures["mark"]
            if figures["mark"] == "flat"
            else f"{figures['mark'].upper()} x {figures['furthest_ratio']:.2f}"
        )
        rows.append((name, f"{shortest['tokens_per_second']:,.0f}", *ratios, mark))
    columns = (
        "mixer",
        f"tokens/s at {result['lengths'][0]:,}",
        *(f"x at {length:,}" for length in result["lengths"][1:]),
    )
    clock = {"cpu": "of CPU time", "wall": "of wall time"}[result["judged_by"]]
    title = (
        f"Forward and backward of {result['tokens_a_step']:,} tokens by row length, rates {clock}: medians and range of "
        f"{result['rounds']} rounds in turns"
    )
    print_rows(title, (*columns, ""), rows)
    say(
        f"judged by the clock whose rounds differ less, {result['judged_by']}; flat: within {result['tolerance']:.0%} of "
        "the shortest rows at every length"
    )
    say(", ".join(f"{name} {value}" for name, value in result["hardware"].items()))
