"""Verbs that make one model of another: convert and distill.

convert: a trained model's softmax attention becomes a mixer of fixed state, or its feed-forwards become experts. distill: what a
teacher says of each sample of a run is stored, for the run to learn from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from amfm.data_pipeline.durable.files import write_file_atomically
from amfm.data_pipeline.terminal import Waiting, format_bytes
from amfm.launch.arguments import ConfigArgument, JsonOption, OverridesArgument, choose_device
from amfm.launch.commands.evaluate import BackendOption, DeviceOption
from amfm.launch.console import print_json, print_pairs, print_rows, say
from amfm.pretrain.launcher_protocol import DONE
from amfm.pretrain.packages import require_extra

if TYPE_CHECKING:
    from amfm.pretrain.config.schema import RunConfig
    from amfm.pretrain.convert.measure import ConversionReport
    from amfm.pretrain.convert.stages import ConversionStage


def convert(
    context: typer.Context,
    path: ConfigArgument,
    overrides: OverridesArgument = None,
    *,
    nproc: Annotated[int, typer.Option(min=1, help="Number of ranks on this machine.")] = 1,
    as_json: JsonOption = False,
) -> None:
    """The verb `convert`.

    With convert.upcycle, feed-forwards become experts instead, and nothing is trained. Each stage is a run below
    run.dir. Stopped at any point, the same command continues.
    """
    require_extra("report", "amfm convert")
    with Waiting("amfm convert") as waiting:
        waiting("loading PyTorch and DeepSpeed")
        from amfm.pretrain.config.errors import ConfigError
        from amfm.pretrain.config.file import load_located
        from amfm.pretrain.convert.rules import check_conversion
        from amfm.pretrain.convert.stages import conversion_stages
        from amfm.pretrain.convert.weights import write_start

        located = load_located(path, overrides or [])
        try:
            check_conversion(located.config, nproc)
        except ConfigError as error:
            raise error.located(located.origins) from error
        config = located.config
        if config.convert is not None and config.convert.upcycle is not None:
            upcycle_model(config, waiting, as_json=as_json)
            return
        waiting("reading the teacher")
        start = write_start(config, waiting)
    stages = list(conversion_stages(config))
    for number, stage in enumerate(stages, start=1):
        code = run_stage(stage, f"stage {number} of {len(stages)}", nproc, context.obj)
        if code != DONE:
            raise typer.Exit(code)
        if not stage.is_finished():
            say(f"amfm convert: stopped in convert-{stage.name}; the same command continues")
            raise typer.Exit(DONE)
    with Waiting("amfm convert") as waiting:
        from amfm.pretrain.convert.measure import measure_conversion, write_result

        found, tuned = measure_conversion(config, {stage.name: stage for stage in stages}, start, waiting)
        waiting("writing the result")
        write_result(found, tuned, stages)
    print_conversion(found, as_json=as_json)


def upcycle_model(config: RunConfig, waiting: Waiting, *, as_json: bool) -> None:
    """Make experts of the teacher's feed-forwards, and print what came of it."""
    from amfm.pretrain.convert.upcycle import upcycle

    found = upcycle(config, waiting)
    if as_json:
        print_json({"result": str(found.result), **found.to_json()})
        return
    moe = found.model.moe
    assert moe is not None, "an upcycled model has experts"
    pairs: list[tuple[str, object]] = [
        ("pattern", found.model.parsed_pattern.canonical()),
        ("experts", f"{moe.num_experts} of width {moe.expert_hidden_size}, {moe.top_k} per token"),
        ("parameters", f"{found.parameters[1]:,} ({found.active[1]:,} active); dense: {found.parameters[0]:,}"),
        ("nats per token", f"{found.losses[1]:.4f}; dense: {found.losses[0]:.4f}, on {found.compared}"),
        ("largest difference of logits", f"{found.max_logit_difference:.1e}"),
        ("result", f"{found.result} (weights, model.yaml)"),
        ("train on", f"run.initial_weights={found.result}, extends: {found.result}/model.yaml"),
    ]
    print_pairs("Upcycled model", pairs)


def run_stage(stage: ConversionStage, place: str, nproc: int, run: Callable[[Sequence[str]], int]) -> int:
    """Run a stage that is not finished as ranks on this machine, each by the command line `run`; returns the exit code."""
    from amfm.launch.cluster.local import run_layouts
    from amfm.pretrain.config.file import resolved_yaml
    from amfm.pretrain.convert.weights import complete_stage

    if not stage.is_finished():
        say(f"amfm convert: {place}, convert-{stage.name}: {stage.config.train.steps} steps in {stage.run_dir}")
        write_file_atomically(stage.file, resolved_yaml(stage.config).encode())
        code = run_layouts(stage.config, ["train", str(stage.file)], nproc, run)
        if code != DONE or not stage.is_finished():
            return code
    complete_stage(stage)
    return DONE


def print_conversion(found: ConversionReport, *, as_json: bool) -> None:
    """Print the table of losses, the shares, and the verdict."""
    if as_json:
        print_json({"result": str(found.result), **found.to_json()})
        return
    from amfm.pretrain.convert.measure import TEACHER

    teacher = found.losses[TEACHER]
    rows = [(name, f"{loss:.4f}", f"{loss - teacher:+.4f}") for name, loss in found.losses.items()]
    title = f"Conversion to {found.pattern}, {found.tokens:,} held-out tokens"
    print_rows(title, ("model", "nats per token", "vs. the teacher"), rows)
    routed = [
        (name, f"{source.loss:.4f}", f"block {block}", "  ".join(f"{share:.2f}" for share in shares))
        for name, source in found.routed.items()
        for block, shares in source.shares.items()
    ]
    if routed:
        print_rows("Updates by source", ("source", "nats per token", "router", "share of the routes"), routed)
    pairs: list[tuple[str, object]] = []
    if found.linear_share:
        shares = ", ".join(f"block {block} {share:.2f}" for block, share in found.linear_share.items())
        pairs.append(("mass outside the window", shares))
    left = found.start.left
    pairs += [
        ("weights", f"{len(found.start.taken)} taken, {len(found.start.new)} new, {len(left)} of the teacher left out"),
        ("verdict", found.verdict),
        ("result", f"{found.result} (weights, model.yaml, conversion.json, conversion.svg)"),
    ]
    print_pairs("", pairs)


def add_verbs(app: typer.Typer) -> None:
    """Add the verbs of this file to the command."""
    app.command(epilog="Example: amfm convert configs/conversion/convert.yaml --nproc 2")(convert)
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

        from amfm.pretrain.checks.check_run import check_run
        from amfm.pretrain.config.errors import ConfigError
        from amfm.pretrain.config.file import load_located
        from amfm.pretrain.distillation.write import write_store

        located = load_located(path, overrides or [])
        config = located.config
        if config.distill is None or config.distill.store is None:
            raise ValueError(
                f"{path} has no distill.store; name the folder to write, such as distill.store=data/teacher"
            )
        try:
            check_run(config, None)
        except ConfigError as error:
            raise error.located(located.origins) from error
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
