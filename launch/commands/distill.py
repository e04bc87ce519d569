"""The verb distill: what a teacher says of each sample of a run is stored, for the run to learn from."""

from __future__ import annotations

import typer

from amfm.data_pipeline.terminal import Waiting, format_bytes
from amfm.launch.arguments import ConfigArgument, JsonOption, OverridesArgument, choose_device
from amfm.launch.commands.evaluate import BackendOption, DeviceOption
from amfm.launch.console import print_json, print_pairs


def add_verbs(app: typer.Typer) -> None:
    """Add the verbs of this file to the command."""
    distill = typer.Typer(epilog="Example: amfm distill store run.yaml", no_args_is_help=True)
    distill.callback()(_keep_name)
    distill.command(epilog="Example: amfm distill store run.yaml distill.store=data/teacher")(store)
    app.add_typer(distill, name="distill")


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
