"""`amfm bench checkouts`: our training step beside that of another checkout."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from amfm.launch.arguments import JsonOption
from amfm.launch.console import print_json, print_rows, say


def checkouts(
    other: Annotated[Path, typer.Argument(metavar="CHECKOUT", help="Folder of the other one (`git worktree add`).")],
    *,
    pairs: Annotated[int, typer.Option(min=1, help="Turns of each checkout, in changing order.")] = 4,
    rounds: Annotated[int, typer.Option(min=1, help="Timed steps a turn.")] = 4,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; default: all cores.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Time `amfm bench step` here and in another checkout in turns, and say how much faster or slower this one is.

    Both run with this Python and its packages.
    """
    from amfm.launch.bench.checkouts import bench_checkouts

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
