"""The verb convert: a trained model's softmax attention becomes a mixer of fixed state, or its feed-forwards become experts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from amfm.data_pipeline.durable.files import write_file_atomically
from amfm.data_pipeline.terminal import Waiting
from amfm.launch.arguments import ConfigArgument, JsonOption, OverridesArgument
from amfm.launch.console import print_json, print_pairs, print_rows, say
from amfm.pretrain.launcher_protocol import DONE
from amfm.pretrain.packages import require_extra

if TYPE_CHECKING:
    from amfm.pretrain.config.schema import RunConfig
    from amfm_convert.measure import ConversionReport
    from amfm_convert.stages import ConversionStage


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

    Example: amfm convert configs/conversion/convert.yaml --nproc 2
    """
    require_extra("report", "amfm convert")
    with Waiting("amfm convert") as waiting:
        waiting("loading PyTorch and DeepSpeed")
        from amfm.pretrain.config.errors import ConfigError
        from amfm.pretrain.config.file import load_located
        from amfm_convert.rules import check_conversion
        from amfm_convert.stages import conversion_stages
        from amfm_convert.weights import write_start

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
        from amfm_convert.measure import measure_conversion, write_result

        found, tuned = measure_conversion(config, {stage.name: stage for stage in stages}, start, waiting)
        waiting("writing the result")
        write_result(found, tuned, stages)
    print_conversion(found, as_json=as_json)


def upcycle_model(config: RunConfig, waiting: Waiting, *, as_json: bool) -> None:
    """Make experts of the teacher's feed-forwards, and print what came of it."""
    from amfm_convert.upcycle import upcycle

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
    from amfm_convert.weights import complete_stage

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
    from amfm_convert.measure import TEACHER

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
