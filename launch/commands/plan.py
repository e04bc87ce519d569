"""The verb that says what a run will cost: plan."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from amfm.launch.arguments import ConfigOrPreset, JsonOption, OverridesArgument, PresetOption, check_picture
from amfm.launch.commands.layouts import (
    print_chosen,
    print_goodput,
    print_layouts,
    print_left_out,
    print_stages,
    print_verdict,
    show_seconds,
)
from amfm.launch.console import loading, print_json, print_pairs, print_rows, say, show_progress
from amfm.launch.existing import choose_config, load_packaged

if TYPE_CHECKING:
    from amfm.launch.plan.estimate import Estimate
    from amfm.launch.plan.plan import Plan

GpusOption = Annotated[int, typer.Option(min=1, help="Number of accelerators (one rank per accelerator).")]
GpuOption = Annotated[str, typer.Option(metavar="a100|h100|h200|b200|FILE.yaml", help="Type of accelerator.")]
TokensOption = Annotated[float | None, typer.Option(help="Number of tokens to train on; default: from train.steps.")]
MarginOption = Annotated[
    float, typer.Option(min=0, max=1, help="Headroom for fragmentation and small tensors, as a fraction of the rest.")
]
OverlapOption = Annotated[
    float,
    typer.Option(min=0, max=1, help="Fraction of ZeRO-3's gathers and of pipeline sends that overlaps with compute."),
]
ImbalanceOption = Annotated[
    float, typer.Option(min=1, help="Tokens on the busiest expert-parallel rank, relative to the mean.")
]
FailuresOption = Annotated[
    float | None,
    typer.Option(help="Failures per day of the whole job: also print goodput and the best checkpoint interval."),
]
StorageOption = Annotated[
    float | None,
    typer.Option(
        help="With --failures-per-day: bandwidth of the checkpoint storage; default: 2 per node, at most 100."
    ),
]
SearchOption = Annotated[
    bool, typer.Option("--search", help="Search layouts over all axes, not only ZeRO stages and micro-batch sizes.")
]
WhyOption = Annotated[
    bool,
    typer.Option("--why", help="With --search: also list why other layouts were left out, and what was not tried."),
]
WriteOption = Annotated[
    bool, typer.Option("--write-layout", help="With --search: write the fastest layout that fits into CONFIG.yaml.")
]
PictureOption = Annotated[
    Path | None,
    typer.Option(metavar="OUT", help="Also draw memory, step time and the pipeline, as .png, .svg or .pdf."),
]
TraceOption = Annotated[
    bool,
    typer.Option("--trace", help="Also run steps on simulated GPUs and compare them with the plan."),
]
RankOption = Annotated[
    int | None,
    typer.Option(help="With --trace: rank to trace; default: one of the first and one of the last pipeline stage."),
]
StageOption = Annotated[str | None, typer.Option(help="With --trace: training stage to trace; default: the first.")]
TimelineOption = Annotated[
    Path | None,
    typer.Option(
        metavar="OUT.json",
        help="With --trace: write a timeline of every pipeline stage for Perfetto; --picture draws it too.",
    ),
]


def plan(
    path: ConfigOrPreset = None,
    overrides: OverridesArgument = None,
    *,
    preset: PresetOption = None,
    gpus: GpusOption,
    gpu: GpuOption = "h100",
    tokens: TokensOption = None,
    margin: MarginOption = 0.1,
    overlap: OverlapOption = 0.5,
    imbalance: ImbalanceOption = 1.2,
    failures_per_day: FailuresOption = None,
    storage_gb_per_second: StorageOption = None,
    search: SearchOption = False,
    why: WhyOption = False,
    write: WriteOption = False,
    picture: PictureOption = None,
    trace: TraceOption = False,
    rank: RankOption = None,
    stage: StageOption = None,
    timeline: TimelineOption = None,
    as_json: JsonOption = False,
) -> None:
    """The verb `plan`."""
    path, overrides = choose_config(path, overrides, preset)
    from amfm.launch.plan.hardware import load_hardware

    hardware = load_hardware(gpu)
    check_trace_options(trace, search, rank, stage, timeline)
    tracing = load_packaged("plan.trace", "simulate")(rank, stage, timeline) if trace else None
    check_write_options(write, search, overrides, preset)
    if why and not search:
        raise ValueError("--why has no effect without --search; add it, or leave it out")
    check_failure_options(failures_per_day, storage_gb_per_second)
    if picture is not None:
        check_picture(picture)
    if tokens is not None and not tokens > 0:
        raise ValueError(f"--tokens {tokens:g} must be greater than 0; use for example 1e12")
    numbers = None if search else range(gpus, 0, -hardware.gpus_per_node)
    with loading("plan"):
        from amfm.pretrain.checks.load import load_checked

        config = load_checked(path, overrides or [], world_size=numbers)
        from amfm.launch.plan.estimate import Assumptions
        from amfm.launch.plan.plan import make_plan, plan_as_dict

    storage = None if storage_gb_per_second is None else 1e9 * storage_gb_per_second
    assumptions = Assumptions(
        margin=margin,
        overlap=overlap,
        imbalance=imbalance,
        failures_per_day=failures_per_day,
        storage_bytes_per_second=storage,
    )
    if search:
        with show_progress("layouts tried", every_seconds=10) as progress:
            made = make_plan(config, hardware, gpus, assumptions, tokens=tokens, search=True, progress=progress)
    else:
        made = make_plan(config, hardware, gpus, assumptions, tokens=tokens)
    if tracing is not None:
        tracing.run(config, gpus, hardware, assumptions)
    if picture is not None:
        if tracing is not None:
            tracing.draw(picture)
        else:
            from amfm.launch.plan.picture import draw_plan

            draw_plan(made, assumptions, picture)
        say(f"wrote {picture}")
    if write:
        write_winner(made, path)
    if as_json:
        print_json(plan_as_dict(made) | (tracing.as_dict() if tracing is not None else {}))
        return
    print_verdict(made, is_written=write)
    print_plan(made, str(path))
    print_left_out(made, whole=why)
    print_advice(made)
    if tracing is not None:
        tracing.print()


def check_trace_options(trace: bool, search: bool, rank: int | None, stage: str | None, timeline: Path | None) -> None:
    """Raise ValueError for options of --trace that would have no effect."""
    if trace and search:
        raise ValueError(
            "--trace runs the configuration's own layout, and --search looks for another; give one of them"
        )
    given = {"--rank": rank, "--stage": stage, "--timeline": timeline}
    lost = [name for name, value in given.items() if value is not None]
    if lost and not trace:
        raise ValueError(f"{lost[0]} has no effect without --trace; add it, or leave it out")


def check_failure_options(failures_per_day: float | None, storage_gb_per_second: float | None) -> None:
    """Raise ValueError for rates that cannot be, and for a storage rate that nothing reads."""
    for name, value in (
        ("--failures-per-day", failures_per_day),
        ("--storage-gb-per-second", storage_gb_per_second),
    ):
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name} {value:g} must be greater than 0, for example 8")
    if storage_gb_per_second is not None and failures_per_day is None:
        raise ValueError("--storage-gb-per-second is read only with --failures-per-day; give both")


def check_write_options(write: bool, search: bool, overrides: list[str], preset: str | None) -> None:
    """Check that --write gets a layout that was searched for this very file. Raises ValueError."""
    if write and preset is not None:
        raise ValueError(f"--write-layout writes into CONFIG.yaml, and --preset {preset} is amfm's own; copy it first")
    if write and (overrides or not search):
        raise ValueError(
            "--write-layout writes what --search finds for CONFIG.yaml as it is: add --search, without overrides"
        )


def write_winner(made: Plan, path: Path) -> None:
    """Write each stage's layout into the configuration file. Raises ValueError if none fits a stage."""
    from amfm.launch.plan.plan import advise
    from amfm.launch.plan.write_layout import write_layout

    chosen = [entry.chosen for entry in made.stages if entry.chosen is not None]
    if len(chosen) < len(made.stages):
        lacking = next(entry.stage.name for entry in made.stages if entry.chosen is None)
        raise ValueError(f"--write-layout: no layout that was tried fits stage {lacking}; {advise(made)}")
    write_layout(path, chosen)
    say(f"wrote {path}: {chosen[0].layout.describe()}")
    for before, item, entry in zip(chosen, chosen[1:], made.stages[1:]):
        if item.layout != before.layout:
            say(f"wrote stage {entry.stage.name}: {item.layout.describe()}")


def print_plan(made: Plan, title: str) -> None:
    """Print the plan as tables: model, memory, step, stages, layouts."""
    from amfm.launch.plan.hardware import GIB
    from amfm.launch.plan.plan import SECONDS_A_DAY
    from amfm.pretrain.report.numbers import count, short

    counts, own = made.counts, made.own
    kinds = [kind for kind, total in counts.total_by_kind.items() if total]
    rows = [
        (kind, f"{counts.total_by_kind[kind]:,}", f"{counts.active_by_kind[kind]:,}", short(made.flops.get(kind, 0)))
        for kind in kinds
    ]
    rows += [(kind, "-", "-", short(flops)) for kind, flops in made.flops.items() if kind not in counts.total_by_kind]
    rows.append(("all", f"{counts.total:,}", f"{counts.active:,}", short(sum(made.flops.values()))))
    print_rows(f"Model of {title}", ("part", "parameters", "active", "FLOPs per token"), rows)
    parts = [(name, f"{size / GIB:,.2f} GiB") for name, size in own.memory.parts.items()]
    parts.append(("all", f"{own.memory.total() / GIB:,.2f} of {made.hardware.memory_gib:,.1f} GiB"))
    print_pairs(f"Peak memory of the most loaded rank, in the {own.memory.phase}: {own.layout.describe()}", parts)
    times = describe_step(own)
    times.append(("tokens per day", count(made.tokens / made.seconds() * SECONDS_A_DAY)))
    print_pairs(f"Step time on {own.layout.ranks} x {made.hardware.name}", times)
    held = made.host
    saved = f"{held.save_bytes / GIB:,.1f} GiB of {held.ranks} ranks, {held.rank_bytes / GIB:,.2f} GiB written by each"
    print_pairs("Memory of each host", [("the copy that a save makes and keeps", saved)])
    if made.store_bytes is not None:
        print_pairs(
            "Store of the teacher", [("size, written by amfm distill store", f"{made.store_bytes / GIB:,.3g} GiB")]
        )
    print_sparse(made)
    print_replicas(made)
    print_goodput(made)
    if len(made.stages) > 1:
        print_stages(made)
        print_chosen(made)
    print_layouts(made)
    if made.is_search and made.layouts and made.layouts[0].layout != own.layout:
        best = made.layouts[0]
        print_pairs(f"Step time of the fastest layout: {best.layout.describe()}", describe_step(best))
    if made.cut is not None:
        seconds = f"{show_seconds(made.cut.estimate.step.total())} a step ({made.cut.gain:+.1%})"
        cut = [("fastest layout, cut there", seconds), ("to use it", f"model.pattern='{made.cut.pattern}'")]
        print_pairs("Pipeline cut by predicted seconds in place of FLOPs", cut)


def print_advice(made: Plan) -> None:
    """Print which layout was shown where the configuration's own does not suit, and what would fit, on standard error."""
    from amfm.launch.plan.plan import advise

    own = made.own
    if not made.is_own:
        say(
            f"amfm: the configuration's own layout does not suit {own.layout.ranks} ranks; shown is {own.layout.describe()}"
        )
    advice = advise(made)
    if advice:
        say(f"amfm: warning: {advice}")


def print_sparse(made: Plan) -> None:
    """Print from which rows on an indexer pays; nothing if no block has one."""
    from amfm.launch.plan.plan import sparse_from

    rows = [
        (name, "never" if length is None else f"sequences of about {length:,} tokens")
        for name, length in sparse_from(made).items()
    ]
    if rows:
        print_pairs(
            f"Sparse attention is faster than dense on {made.hardware.name} from (predicted, never measured)", rows
        )


def print_replicas(made: Plan) -> None:
    """Print what replicas in the memory of the nodes cost and save; nothing if the run writes none."""
    from amfm.launch.plan.hardware import GIB

    cost = made.replicas
    if cost is None:
        return
    without = cost.most_lost_without_seconds
    alone = "" if without is None else f"; {without:,.0f} s with only checkpoints"
    rows = [
        ("memory of each host, two replicas", f"{cost.node_bytes / GIB:,.1f} GiB"),
        ("sent by each host to the next", f"{cost.sent_bytes / GIB:,.1f} GiB per replica"),
        (
            "written in the background in",
            f"{cost.seconds:,.1f} s, of {cost.every_steps * made.own.step.total():,.1f} s",
        ),
        ("lost by a failure at most", f"{cost.most_lost_seconds:,.0f} s of training{alone}"),
    ]
    where = f"on {cost.nodes} hosts" if cost.nodes > 1 else "on one host, which they do not outlive"
    print_pairs(f"Replicas every {cost.every_steps:,} steps {where}", rows)


def describe_step(item: Estimate) -> list[tuple[str, str]]:
    """Where the seconds of a step go, each part with its share, then the whole, what it hides, and the MFU."""
    total = item.step.total()
    parts = [(name, f"{show_seconds(seconds)}, {seconds / total:.0%}") for name, seconds in item.step.parts()]
    beside = [
        (name, f"{show_seconds(seconds)}, overlapped and not added") for name, seconds in item.step.hidden_parts()
    ]
    ends = [
        (f"MFU, {each.name}", f"{each.mfu:.1%}: {each.assumes}") for each in item.mfu_range if each.name != "expected"
    ]
    expected = "MFU, expected; no GPU has measured it" if ends else "MFU"
    mixed = [] if item.mfu_mixed is None else [("MFU, each product at its own peak", f"{item.mfu_mixed:.1%}")]
    return [*parts, *beside, ("all", show_seconds(total)), (expected, f"{item.mfu:.1%}"), *mixed, *ends]


def add_verbs(app: typer.Typer) -> None:
    """Register the verbs of this file."""
    app.command(epilog="Example: amfm plan configs/ladder_8b_a1b.yaml --gpus 64 --gpu h100 --json")(plan)
