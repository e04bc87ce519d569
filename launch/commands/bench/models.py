"""`amfm bench models`: training steps of several models in turns, each beside the first."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from amfm.launch.arguments import JsonOption
from amfm.launch.console import print_json, print_rows, say


def models(
    paths: Annotated[
        list[Path] | None,
        typer.Argument(metavar="MODEL...", help="Configurations, run directories or weights folders."),
    ] = None,
    *,
    mixers: Annotated[
        str | None,
        typer.Option(metavar="G,K", help="Instead: models of one mixer each, by letters or names, of equal sizes."),
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Rows a step.")] = 4,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens a row.")] = 256,
    rounds: Annotated[int, typer.Option(min=1, help="Timed steps of each, taking turns.")] = 9,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; default: one.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Time forward and backward passes of models on the same tokens; above 1: faster than the first. Or of mixers.

    One thread where none is asked for, so that CPU time means something.
    """
    from amfm.launch.bench.models import bench_models, mixer_models, read_model

    if paths and mixers is not None:
        raise ValueError(f"--mixers names what is compared, and so does {paths[0]}; leave out one of them")
    named = mixer_models(mixers) if mixers is not None else {str(path): read_model(path) for path in paths or []}
    if len(named) < 2:
        given = f"{next(iter(named))} is one; name another" if named else "none is named; name two, or --mixers G,K"
        raise ValueError(f"bench models compares two or more models, and {given}")
    result = bench_models(named, rows=rows, tokens=tokens, rounds=rounds, num_threads=threads or 1, report=say)
    if as_json:
        print_json(result)
        return
    table = [
        (
            found["model"],
            f"{found['parameters']:,}",
            f"{found['tokens_per_cpu_second']:,.0f}",
            f"{found['ratio_cpu']:.2f} ({found['ratio_cpu_min']:.2f} to {found['ratio_cpu_max']:.2f})",
            f"{found['ratio_wall']:.2f}",
        )
        for found in result["models"]
    ]
    title = f"Forward and backward of {rows} x {tokens} tokens, {rounds} rounds in turns"
    print_rows(title, ("model", "parameters", "tokens a CPU second", "x the first", "by the wall"), table)
    say(", ".join(f"{name} {value}" for name, value in result["hardware"].items()))
