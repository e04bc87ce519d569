"""`python -m benchmarks.published`: the plan vs. published training speeds."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from amfm.launch.arguments import JsonOption
from amfm.launch.console import print_json, print_pairs, print_rows, say
from benchmarks.command import main

if TYPE_CHECKING:
    from amfm.launch.plan.hardware import Hardware

LARGE_ERROR = 0.2  # of which the table names the cause


def published(
    presets: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where the presets are.")] = Path("configs"),
    *,
    fit: Annotated[
        bool,
        typer.Option("--fit", help="Also fit the efficiencies on half of the runs and plan the other half with them."),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Plan runs whose speed on H100 is published, and print the error of each: the table of docs/benchmarks/planning.md."""
    from benchmarks.published.planning import anchor_as_dict, fit_halves, load_anchors, load_fp8_anchors

    anchors = load_anchors(presets)
    rows = [anchor_as_dict(anchor) for anchor in anchors]
    halves = None
    if fit:
        halves, ratios = fit_halves(anchors)
        for row, ratio in zip(rows, ratios):
            row["error_of_the_other_halfs_fit"] = ratio - 1
    narrow = [anchor_as_dict(anchor) for anchor in load_fp8_anchors(presets)]
    if as_json:
        print_json([*rows, *narrow])
        return
    print_rows("Published speeds and the plan's", *_table(rows))
    print_rows("In FP8, each vs. a plan by a recipe", *_table(narrow))
    _say_errors(rows, halves)
    if any(row["is_stand_in"] for row in rows):
        say("Lightning is planned with Nano's blocks; its error is of FLOPs per second")


def _table(rows: list[dict[str, Any]]) -> tuple[tuple[str, ...], list[tuple[Any, ...]]]:
    """Columns and rows of the printed table."""
    columns = (
        "model",
        "H100",
        "layout",
        "routing",
        "published tokens/s/GPU",
        "planned",
        "error",
        "fitted",
        "exchanges",
        "GFLOP per token, published",
        "counted",
        "why, where it is more than 20% off",
    )
    return columns, [
        (
            row["name"],
            row["gpus"],
            row["layout"],
            row["routing"],
            f"{row['published_tokens_per_second_per_gpu']:,}",
            f"{row['predicted_tokens_per_second_per_gpu']:,.0f}",
            f"{row['error']:+.0%}",
            f"{row['error_of_the_other_halfs_fit']:+.0%}" if "error_of_the_other_halfs_fit" in row else "",
            f"{row['exchange_share']:.0%}",
            f"{row['published_flops_per_token'] / 1e9:.1f}",
            f"{row['flops_per_token'] / 1e9:.1f}",
            row["cause"] if abs(row["error"]) > LARGE_ERROR else "",
        )
        for row in rows
    ]


def _say_errors(rows: list[dict[str, Any]], halves: tuple[Hardware, Hardware] | None) -> None:
    """Median and largest error, of forced and of natural routing, and what was fitted."""
    from benchmarks.published.planning import FITTED

    for key, words in (("error", "data sheet"), ("error_of_the_other_halfs_fit", "fitted on the other half")):
        for routing in ("forced", "natural"):
            errors = [abs(row[key]) for row in rows if row["routing"] == routing and key in row]
            if errors and key == "error_of_the_other_halfs_fit":
                words = f"{len(FITTED)} free constants, {words}"
            if errors:
                say(
                    f"{words}, {routing} routing: median error {statistics.median(errors):.0%}, worst {max(errors):.0%}"
                )
    for name, hardware in zip(("the 1st, 3rd, ... run", "the 2nd, 4th, ... run"), halves or ()):
        values = hardware.model_dump()
        efficiencies = [(key, f"{values[key]:.2f}") for key in FITTED]
        print_pairs(f"{len(FITTED)} free constants, fitted on {name}", efficiencies)


if __name__ == "__main__":
    main(published)
