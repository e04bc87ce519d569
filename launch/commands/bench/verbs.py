"""Verbs that measure: `amfm bench ...`, side by side in one run; a file each."""

from __future__ import annotations

import typer

from amfm.launch.commands.bench.calibrate import calibrate
from amfm.launch.commands.bench.card import card
from amfm.launch.commands.bench.checkouts import checkouts
from amfm.launch.commands.bench.checkpoint import checkpoint
from amfm.launch.commands.bench.clients import clients
from amfm.launch.commands.bench.communication import communication
from amfm.launch.commands.bench.data import data
from amfm.launch.commands.bench.export import export
from amfm.launch.commands.bench.kernels import kernels
from amfm.launch.commands.bench.length import length
from amfm.launch.commands.bench.memory import memory
from amfm.launch.commands.bench.models import models
from amfm.launch.commands.bench.pipeline import pipeline
from amfm.launch.commands.bench.published import plan
from amfm.launch.commands.bench.soak import soak
from amfm.launch.commands.bench.step import step

VERBS = (
    (step, "amfm bench step --peer transformers --compiled --json"),
    (checkouts, "amfm bench checkouts ../amfm-before --threads 2"),
    (communication, "amfm bench communication parallel.tensor=2 --nproc 2"),
    (length, "amfm bench length --mixers M,G,gla --lengths 1024,16384"),
    (calibrate, "amfm bench calibrate own.yaml --threads 1"),
    (card, "amfm bench card --stage losses --stage resume"),
    (checkpoint, "amfm bench checkpoint --folder runs --json"),
    (export, "amfm bench export configs/ladder_1b_a300m.yaml --times 1,3"),
    (kernels, "amfm bench kernels --op decay_scan --json"),
    (data, "amfm bench data --megabytes 120 --json"),
    (memory, "amfm bench memory configs/ladder_20m.yaml parallel.tensor=2 --nproc 2"),
    (models, "amfm bench models runs/pruned weights/small"),
    (pipeline, "amfm bench pipeline --nproc 2"),
    (plan, "amfm bench plan configs"),
    (clients, "amfm bench clients --readers .clients/readers/bin/python --vllm .clients/vllm/bin/python"),
    (soak, "amfm bench soak --minutes 3 --seed 7"),
)


def add_verbs(app: typer.Typer) -> None:
    """Add `bench` to the command."""
    bench = typer.Typer(
        help="Measure side by side, in one run.",
        epilog="Example: amfm bench step --peer transformers",
        no_args_is_help=True,
    )
    for verb, example in VERBS:
        bench.command(epilog=f"Example: {example}")(verb)
    app.add_typer(bench, name="bench")
