"""Verbs that measure: `amfm bench ...`, side by side in one run."""

from __future__ import annotations

import shutil
from typing import Annotated, Any, Literal

import typer

from launch.cli_config import JsonOption
from launch.console import print_json, print_rows, say

PLAIN = ("ours_fp32", "ours_bf16")
COMPILED = ("ours_fp32_compiled", "ours_bf16_compiled")
PEER = ("transformers_default", "transformers_tuned")

bench = typer.Typer(
    help="Measure side by side, in one run.",
    epilog="Example: amfm bench step --peer transformers",
    no_args_is_help=True,
)


@bench.command(epilog="Example: amfm bench step --peer transformers --compiled --json")
def step(
    *,
    peer: Annotated[Literal["transformers", "none"], typer.Option(help="Whose step to time beside ours.")] = "none",
    compiled: Annotated[
        bool, typer.Option(help="Also time our step with compiled blocks (minutes to compile).")
    ] = False,
    rounds: Annotated[int, typer.Option(min=1, help="Timed steps of each variant, taking turns.")] = 8,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; default: all cores.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Time a training step of a 19.5M-parameter Granite-shaped hybrid: 4 rows of 512 tokens, same weights for all."""
    from launch.bench_step import bench_step

    if compiled is None:
        compiled = shutil.which("c++") is not None
        if not compiled:
            say("no C++ compiler (c++) here, so the compiled variants are left out; install g++ to time them")
    names = [*(PEER if peer == "transformers" else ()), "bare_loop", *PLAIN, *(COMPILED if compiled else ())]
    result = bench_step(names, rounds=rounds, num_threads=threads, report=say)
    if as_json:
        print_json(result)
    else:
        print_step_table(result)


def print_step_table(result: dict[str, Any]) -> None:
    """The variants of `bench_step` as a table, and what they were measured on."""
    rows = [
        (
            name,
            f"{figures['seconds']:.3f}",
            f"{figures['seconds_min']:.3f} to {figures['seconds_max']:.3f}",
            f"{figures['tokens_per_second']:,.0f}",
            f"{figures['ratio_to_transformers_default']:.2f}" if figures["ratio_to_transformers_default"] else "",
            f"{figures['first_loss']:.5f}",
        )
        for name, figures in result["variants"].items()
    ]
    columns = ("variant", "median s", "min to max s", "tokens/s", "x transformers", "first loss")
    print_rows(f"A training step, {result['rounds']} rounds in turns", columns, rows)
    say(", ".join(f"{name} {value}" for name, value in result["hardware"].items()))


def add_verbs(app: typer.Typer) -> None:
    """Add `bench` to the command."""
    app.add_typer(bench, name="bench")
