"""`amfm bench plan`: published training speeds beside the plan's."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from launch.arguments import JsonOption
from launch.console import print_json, print_rows, say


def plan(
    presets: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where the presets are.")] = Path("configs"),
    *,
    as_json: JsonOption = False,
) -> None:
    """Plan runs whose speed on H100 is published, and print the error of each: the table of docs/benchmarks/planning.md."""
    from launch.bench.published import plan_anchors

    rows = plan_anchors(presets)
    if as_json:
        print_json(rows)
        return
    lines = [
        (
            f"{row['name']}{', approximated' if row['is_like'] else ''}",
            row["gpus"],
            row["layout"],
            row["recompute"],
            f"{row['published_tokens_per_second_per_gpu']:,}",
            f"{row['predicted_tokens_per_second_per_gpu']:,.0f}",
            f"{row['error']:+.0%}",
            f"{row['exchange_share']:.0%}",
            f"{row['published_flops_per_token'] / 1e9:.1f}",
            f"{row['flops_per_token'] / 1e9:.1f}",
            "" if row["fits"] else "no",
        )
        for row in rows
    ]
    columns = (
        "model",
        "H100",
        "layout",
        "recomputed",
        "published tokens/s/GPU",
        "planned",
        "error",
        "exchanges",
        "published GFLOP a token",
        "counted",
        "fits",
    )
    print_rows("Published speeds and the plan's", columns, lines)
    if any(row["is_like"] for row in rows):
        say("approximated: the preset's attention is not the model's; its file says what is equal")
