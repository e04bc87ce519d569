"""Verbs that measure the machine available: `amfm bench ...`; a file each. Those of a clone are in benchmarks/."""

from __future__ import annotations

import typer

from amfm.launch.commands.bench.calibrate import calibrate
from amfm.launch.commands.bench.gpu import gpu
from amfm.launch.commands.bench.kernels import kernels
from amfm.launch.commands.bench.numerics import numerics

VERBS = (
    (calibrate, "amfm bench calibrate own.yaml --threads 1"),
    (gpu, "amfm bench gpu --stage losses --stage resume"),
    (kernels, "amfm bench kernels --op decay_scan --json"),
    (numerics, "amfm bench numerics configs/tiny_cpu.yaml --recipes fp8_block --steps 40"),
)


def add_verbs(app: typer.Typer) -> None:
    """Add `bench` to the command."""
    bench = typer.Typer(
        epilog="Example: amfm bench gpu",
        no_args_is_help=True,
    )
    for verb, example in VERBS:
        bench.command(epilog=f"Example: {example}")(verb)
    app.add_typer(bench, name="bench")
