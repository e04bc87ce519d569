"""Verbs about a run: train, report."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from amfm.data_pipeline.memory import no_garbage_collection
from amfm.data_pipeline.terminal import Waiting
from amfm.launch.arguments import (
    ConfigOrPreset,
    HelpAllOption,
    JsonOption,
    OverridesArgument,
    PresetOption,
    check_picture,
)
from amfm.launch.console import print_json, print_pairs, say
from amfm.launch.existing import choose_config, require_all_exist
from amfm.launch.rank_command import choose_wait_policy
from amfm.pretrain.launcher_protocol import GOES_ON
from amfm.pretrain.packages import require_extra


def train(
    context: typer.Context,
    path: ConfigOrPreset = None,
    overrides: OverridesArgument = None,
    *,
    preset: PresetOption = None,
    nproc: Annotated[int, typer.Option(min=1, help="Ranks on this machine; the losses do not depend on it.")] = 1,
    force: Annotated[bool, typer.Option("--force", help="Train even if a stage is predicted not to fit.")] = False,
    help_all: HelpAllOption = False,
    as_json: JsonOption = False,
) -> None:
    """The verb `train`."""
    path, overrides = choose_config(path, overrides, preset)
    is_first = os.environ.get("RANK", "0") == "0"
    # Under torchrun or --nproc this process is one rank of several.
    is_rank = nproc == 1 and "RANK" in os.environ
    if not is_rank:
        from amfm.pretrain.checks.early import check_early
        from amfm.pretrain.config.file import load_config

        config = load_config(path, overrides)
        check_early(config, describe_prepare(path, overrides, preset))
        note = choose_wait_policy(os.environ, nproc, config.train.num_threads)
        if note:
            say(f"amfm train: {note}")
    with Waiting("amfm train", speaks=is_first) as waiting, no_garbage_collection():
        waiting("loading PyTorch and DeepSpeed")
        from amfm.pretrain.checks.load import load_checked
        from amfm.pretrain.stages import fresh_starts

        numbers = [int(os.environ["WORLD_SIZE"])] if is_rank else range(nproc, 0, -1)
        config = load_checked(
            path, overrides or [], world_size=numbers, resumes=True, goes_on=is_rank and GOES_ON in os.environ
        )
        starts_ranks = nproc > 1 or (not is_rank and bool(fresh_starts(config)))
        if not starts_ranks:
            from amfm.pretrain.train import train as train_run
    from amfm.launch.follow_run import conclude, following

    if starts_ranks:
        from amfm.launch.cluster.local import run_layouts

        arguments = ["train", str(path), *(overrides or []), *(["--force"] if force else [])]
        with following(config):
            code = run_layouts(config, arguments, nproc, context.obj)
    else:
        from amfm.launch.plan.gpu_fit import check_fits, local_gpu
        from amfm.pretrain.checkpoint.manifest_file import continued_step
        from amfm.pretrain.failures import describe_exit, settings_worked

        gpu = None if force else local_gpu()
        if gpu is not None:
            check_fits(config, numbers[0], gpu, steps_done=max(0, continued_step(config)))
        try:
            with settings_worked(config.run.dir), nullcontext() if is_rank else following(config):
                code = train_run(config)
        except SystemExit as error:  # of a plug-in while the run started: not what the shell is to see
            raise RuntimeError(describe_exit(error)) from error
        if is_first:
            for line in conclude(Path(config.run.dir), code):
                say(f"amfm train: {line}")
    if as_json and is_first:
        print_json(summarize(config.run.dir))
    raise typer.Exit(code)


def describe_prepare(path: Path, overrides: Sequence[str], preset: str | None) -> str:
    """The command line that prepares the store of a run."""
    given = f"--preset {preset}" if preset is not None else shlex.quote(str(path))
    return " ".join(["amfm prepare", given, *(shlex.quote(word) for word in overrides if word.startswith("data."))])


def summarize(run_dir: str) -> dict[str, Any]:
    """Progress of a run as JSON values: by its newest checkpoint too, since others may take its log away, as logrotate does."""
    from amfm.pretrain.checkpoint.manifest_file import newest_saved_step
    from amfm.pretrain.config.file import load_config
    from amfm.pretrain.report.data import is_number, read_json_lines
    from amfm.pretrain.stages import total_steps

    folder = Path(run_dir)
    log = folder / "metrics.jsonl"
    lines = sorted(
        (line for line in (read_json_lines(log)[0] if log.is_file() else []) if is_number(line.get("step"))),
        key=lambda line: int(line["step"]),
    )
    step = max(newest_saved_step(folder), int(lines[-1]["step"]) if lines else 0)
    newest = {
        name: next((line[name] for line in reversed(lines) if is_number(line.get(name))), None)
        for name in ("tokens", "loss", "validation_loss")
    }
    return {
        "run_dir": run_dir,
        "finished": step >= total_steps(load_config(folder / "config.yaml")),
        "step": step,
        **newest,
    }


def report(
    run_dirs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN_DIR...",
            help="One or more run directories.",
            callback=require_all_exist,
        ),
    ],
    *,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.html",
            help="Output file; default: report.html in the run directory, or next to several.",
        ),
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also draw the curves, as .png, .svg or .pdf.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """The verb `report`.

    Several runs are over each other, with the settings in which they differ.
    """
    if picture is not None:
        check_picture(picture)
    if out is not None:
        check_page(out)
    require_extra("report", "amfm report")
    from amfm.pretrain.report.report import write_report

    page = write_report(run_dirs, out)
    if picture is not None:
        from amfm.pretrain.report.data import read_run
        from amfm.pretrain.report.overlay import draw_picture

        draw_picture([read_run(folder) for folder in run_dirs], picture)
    if as_json:
        drawn = {} if picture is None else {"picture": str(picture)}
        print_json({"report": str(page), "bytes": page.stat().st_size} | drawn)
    else:
        pairs: list[tuple[str, Any]] = [("page", page), ("kilobytes", f"{page.stat().st_size / 1e3:.0f}")]
        print_pairs("Report", [*pairs, ("picture", picture)] if picture is not None else pairs)


def check_page(path: Path) -> None:
    """Check that a page can be written, before any work is done. Raises ValueError."""
    if path.suffix not in (".html", ".htm"):
        raise ValueError(f"--out {path} must end in .html; use {path.stem or 'report'}.html")
    if not path.parent.is_dir():
        raise ValueError(f"--out {path}: {path.parent} is not a folder; create it, or name another path")


def add_verbs(app: typer.Typer) -> None:
    """Register the verbs of this file."""
    app.command(
        epilog="Example: amfm train configs/tiny_cpu.yaml train.stop_after_steps=20 --nproc 2",
    )(train)
    app.command(epilog="Example: amfm report runs/a runs/b --picture both.svg")(report)
