"""`python -m benchmarks.step`: our training step vs. transformers'."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from amfm.launch.arguments import JsonOption
from amfm.launch.console import print_json, print_rows, say
from benchmarks.command import main
from benchmarks.freed_memory import title_of

PLAIN = ("ours_fp32", "ours_bf16")
COMPILED = ("ours_fp32_compiled", "ours_bf16_compiled")
PEER = ("transformers_default", "transformers_tuned")
STEP_ROUNDS = 8
MUON_PASSES = 8


def step(
    *,
    peer: Annotated[
        Literal["transformers", "none"], typer.Option(help="Whose step to time side by side with ours.")
    ] = "none",
    compiled: Annotated[
        bool, typer.Option(help="Also time our step with compiled blocks (minutes to compile).")
    ] = False,
    muon: Annotated[bool, typer.Option(help="Time our step with Muon against AdamW's instead, in float32.")] = False,
    micro_batches: Annotated[
        int | None, typer.Option(min=1, help="With --muon: micro-batches per step, of 2,048 tokens; default: 8.")
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(metavar="MODEL", help="With --muon: a configuration or run directory, whose model is timed."),
    ] = None,
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Timed steps of each variant, taking turns; default: 8.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; default: all cores.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Time a training step of a 19.5M-parameter Granite-shaped hybrid: 4 sequences of 512 tokens, same weights for all."""
    for flag, value in (("--micro-batches", micro_batches), ("--model", model)):
        if value is not None and not muon:
            raise ValueError(f"{flag} sets the step that --muon compares optimizers by; add it, or remove this")
    if muon and (compiled or peer != "none"):
        raise ValueError(
            "--muon compares only our two optimizers; with it give --model, --micro-batches, --rounds, --threads"
        )
    if muon:
        compare_optimizers(model, micro_batches or MUON_PASSES, rounds or STEP_ROUNDS, threads, as_json=as_json)
        return
    from benchmarks.step.bench import bench_step

    names = [*(PEER if peer == "transformers" else ()), "bare_loop", *PLAIN, *(COMPILED if compiled else ())]
    result = bench_step(names, rounds=rounds or STEP_ROUNDS, num_threads=threads, report=say)
    if as_json:
        print_json(result)
    else:
        print_step_table(result)


def compare_optimizers(
    model: Path | None, micro_batches: int, rounds: int, threads: int | None, *, as_json: bool
) -> None:
    """Time our step with AdamW and with Muon, on the benchmark's own model or another, and print the ratio."""
    from benchmarks.calibration.fit import ROWS, TOKENS
    from benchmarks.models import read_model
    from benchmarks.step.bench import Shape, bench_optimizers

    result = bench_optimizers(
        rounds=rounds,
        num_threads=threads,
        micro_batches=micro_batches,
        report=say,
        shape=None if model is None else Shape(ROWS, TOKENS, read_model(model)),
    )
    if as_json:
        print_json(result)
        return
    print_step_table(result)
    for treatment, ratio in result["muon_to_adamw"].items():
        say(f"Muon's step takes {ratio:.2f} of AdamW's ({title_of(treatment)})")


def print_step_table(result: dict[str, Any]) -> None:
    """The variants of `bench_step`: each as it trains, then with memory treated alike, and what they were measured on."""
    variants = result["variants"]
    if all(figures["as_trained"] for figures in variants.values()):
        rows = [
            (name, *_step_figures(figures["as_trained"]), f"{figures['first_loss']:.5f}")
            for name, figures in variants.items()
        ]
        columns = ("variant", "median s", "tokens/s", "x transformers", "first loss")
        title = "Each as it trains: transformers returns freed memory, ours keeps it"
        print_rows(f"A training step, {result['rounds']} rounds in turns. {title}", columns, rows)
    for treatment in next(iter(variants.values()))["memory"]:
        rows = []
        for name, figures in variants.items():
            taken = figures["memory"][treatment]
            rows.append((name, *_step_figures(taken), f"{taken['seconds_min']:.3f} to {taken['seconds_max']:.3f}"))
        columns = ("variant", "median s", "tokens/s", "x transformers", "min to max s")
        print_rows(title_of(treatment), columns, rows)
    for remark in result["remarks"]:
        say(remark)
    say(", ".join(f"{name} {value}" for name, value in result["hardware"].items()))


def _step_figures(figures: dict[str, Any]) -> tuple[str, str, str]:
    """Median seconds, tokens per second, and how many times as fast as transformers' default."""
    ratio = figures["ratio_to_transformers_default"]
    return f"{figures['seconds']:.3f}", f"{figures['tokens_per_second']:,.0f}", f"{ratio:.2f}" if ratio else ""


if __name__ == "__main__":
    main(step)
