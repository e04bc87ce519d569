"""`amfm bench memory`: ranks are started, and the main one prints predicted and measured memory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from amfm.launch.arguments import JsonOption, OverridesArgument
from amfm.launch.console import print_json, print_rows, say
from amfm.launch.rank_command import rank_command


def memory(
    path: Annotated[Path | None, typer.Argument(metavar="CONFIG.yaml", help="The configuration of the steps.")] = None,
    overrides: OverridesArgument = None,
    *,
    nproc: Annotated[int, typer.Option(min=1, help="Ranks on this machine.")] = 1,
    table: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Measure all layouts of docs/benchmarks/planning.md with the ladder presets in FOLDER.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Train two steps on random tokens and hold the peak of memory against what `amfm plan` predicts, margin 0."""
    if (path is None) == (table is None):
        raise ValueError(
            "give either CONFIG.yaml, for one layout, or --table configs, for those of docs/benchmarks/planning.md"
        )
    if table is not None:
        from amfm.launch.bench.memory import measure_cases

        _print(measure_cases(table, report=say), as_json=as_json)
        return
    from amfm.pretrain.checks.check_run import load_checked

    assert path is not None, "one of both was given"
    config = load_checked(path, overrides or [], world_size=int(os.environ.get("WORLD_SIZE", str(nproc))))
    if "RANK" not in os.environ:
        from amfm.launch.bench.memory import WITHOUT_CACHES
        from amfm.launch.cluster.local import run_command

        command = rank_command(["bench", "memory", str(path), *(overrides or [])])
        raise typer.Exit(run_command([*command, *(["--json"] if as_json else [])], nproc, WITHOUT_CACHES))
    from amfm.launch.bench.memory import bench_memory

    result = bench_memory(config)
    if os.environ["RANK"] == "0":
        _print({"preset": path.stem, **result}, as_json=as_json)


def _print(result: Any, *, as_json: bool) -> None:
    """Print one row or several, as JSON or as a table with the hardware below."""
    if as_json:
        print_json(result)
        return
    rows = result if isinstance(result, list) else [result]
    lines = [
        (
            row["preset"],
            row["precision"],
            row["ranks"],
            row["layout"] + (f" recompute={row['recompute']}" if row["recompute"] != "none" else ""),
            row["fullest_in"],
            f"{row['predicted_bytes'] / 1e6:,.0f}",
            f"{row['measured_bytes'] / 1e6:,.0f}",
            f"{row['error']:+.1%}",
        )
        for row in rows
    ]
    columns = ("model", "precision", "ranks", "layout", "fullest in", "predicted MB", "measured MB", "error")
    print_rows("Peak memory of the fullest rank", columns, lines)
    say(rows[0]["hardware"])
