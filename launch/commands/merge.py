"""Verbs about weights and samples of trained models: distill and merge.

distill: what a teacher says of each sample of a run is stored, for the run to learn from. merge: the mean of checkpoints.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from amfm.data_pipeline.terminal import Waiting, format_bytes
from amfm.launch.arguments import ConfigArgument, JsonOption, OverridesArgument, choose_device
from amfm.launch.commands.evaluate import BackendOption, DeviceOption
from amfm.launch.console import loading, print_json, print_pairs, print_rows
from amfm.launch.existing import require_exists


def store(
    path: ConfigArgument,
    overrides: OverridesArgument = None,
    *,
    device: DeviceOption = "auto",
    backend: BackendOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Write the teacher's likeliest tokens and their probabilities for every sample of a run to distill.store.

    The teacher is whole on one device. Stopped at any point, the same command continues; files that are there are not written a
    second time, so more steps add to them.
    """
    with Waiting("amfm distill store") as waiting:
        waiting("loading PyTorch")
        import torch

        from amfm.pretrain.checks.load import load_checked
        from amfm.pretrain.distillation.write import write_store

        config = load_checked(path, overrides or [])
        if config.distill is None or config.distill.store is None:
            raise ValueError(
                f"{path} has no distill.store; name the folder to write, such as distill.store=data/teacher"
            )
        report = write_store(config, torch.device(choose_device(device)), backend, waiting)
    if as_json:
        print_json({**vars(report), "path": str(report.path)})
        return
    written = f"{report.files - report.kept:,} written, {report.kept:,} were there"
    print_pairs(
        "Stored",
        [
            ("folder", report.path),
            ("teacher", report.teacher),
            ("samples", f"{report.samples:,}"),
            ("size", format_bytes(report.bytes)),
            ("files", written),
        ],
    )


def _keep_name() -> None:
    """Keep `store` a name of its own: typer would take a single verb for the group."""


def merge(
    run_dir: Annotated[
        Path,
        typer.Argument(metavar="RUN", help="The run directory, or a folder of checkpoints.", callback=require_exists),
    ],
    out: Annotated[
        Path | None, typer.Argument(metavar="OUT", help="Output folder for the weights; must be missing or empty.")
    ] = None,
    *,
    last: Annotated[
        str | None, typer.Option(metavar="N[,N...]", help="Merge the last N; several numbers with --evaluate.")
    ] = None,
    steps: Annotated[str | None, typer.Option(metavar="A,B,C", help="Merge the checkpoints of these steps.")] = None,
    weights: Annotated[
        str,
        typer.Option(help="uniform, wsm (a decay by 1 - sqrt), linear, or numbers such as 0.5,0.3,0.2, oldest first."),
    ] = "uniform",
    evaluate: Annotated[
        bool, typer.Option("--evaluate", help="Measure each merge on the run's held-out text; OUT gets the best.")
    ] = False,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="With --evaluate, stop after about this many tokens; default: all.")
    ] = None,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Merge checkpoints: write the mean of their weights, often better than the last one before the rate decays.

    OUT is a weights folder: for evaluate, export, generate, or run.initial_weights of a run that trains on.
    """
    if (last is None) == (steps is None):
        raise ValueError("give --last N or --steps A,B,C, one of the two")
    counts = numbers("--last", last)
    if len(counts) > 1 and not evaluate:
        raise ValueError(f"--last {last} names several merges; with --evaluate the best is chosen")
    if out is None and not evaluate:
        raise ValueError("OUT is missing; give a folder for the weights, or --evaluate to only measure")
    if max_tokens is not None and not evaluate:
        raise ValueError(f"--max-tokens {max_tokens} has no effect without --evaluate; leave it out")
    with loading("merge"):
        from amfm.pretrain.export.average import best_of, choose_merge, merge_checkpoints
    merges = [choose_merge(run_dir, count, None, weights) for count in counts] or [
        choose_merge(run_dir, None, numbers("--steps", steps), weights)
    ]
    with Waiting("amfm merge") as waiting:
        found = merge_checkpoints(
            run_dir,
            merges,
            out,
            evaluate=evaluate,
            max_tokens=max_tokens,
            device=choose_device(device),
            report=waiting,
        )
    best = best_of(found)
    if as_json:
        print_json(
            {"path": None if out is None else str(out), "best": asdict(best), "merges": list(map(asdict, found))}
        )
        return
    if evaluate:
        rows = [(len(each.steps), describe(each.steps), f"{each.loss:.4f}") for each in found]
        print_rows(f"Merges of {run_dir}", ("checkpoints", "steps", "loss"), rows)
    if out is not None:
        shares = ", ".join(f"{share:.4g}" for share in best.weights)
        print_pairs("Merged", [("folder", out), ("steps", describe(best.steps)), ("weights", shares)])


def numbers(option: str, text: str | None) -> list[int]:
    """Integers above 0 with commas. Raises ValueError."""
    words = [] if text is None else text.split(",")
    if not all(word.strip().isdecimal() and int(word) > 0 for word in words):
        raise ValueError(f"{option} {text} must be integers above 0, with commas between them")
    return [int(word) for word in words]


def describe(steps: tuple[int, ...]) -> str:
    """Steps in words."""
    return ", ".join(map(str, steps))


def add_verbs(app: typer.Typer) -> None:
    """Register the verbs of this file."""
    distill = typer.Typer(epilog="Example: amfm distill store run.yaml", no_args_is_help=True)
    distill.callback()(_keep_name)
    distill.command(epilog="Example: amfm distill store run.yaml distill.store=data/teacher")(store)
    app.add_typer(distill, name="distill")
    app.command(epilog="Example: amfm merge runs/my weights/merged --last 8 --weights wsm")(merge)
