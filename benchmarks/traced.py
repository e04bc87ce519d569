"""The plan vs. simulated ranks over a table of layouts: peaks of memory, bytes by axis, and waits of the host.

How it works: each case is a smaller ladder_1b, of its widths, on 8 or 16 ranks under other axes, ZeRO stages, schedules,
recomputation or blocks. Its ranks take real steps on fake tensors, so no GPU is needed, and no number depends on the
machine. Rows are those of the preset, 4,096 tokens; a micro-batch is one row, and a step has `pipeline + 1` of them or
as many as its schedule asks for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from amfm_simulate.step_traffic import depends_on_router
from amfm_simulate.trace import TracedRank, predicted_bytes, trace_run, traced_bytes

from amfm.launch.arguments import JsonOption
from amfm.launch.console import print_json, print_rows, say
from amfm.launch.plan.exchanges.seconds import PARTS
from amfm.launch.plan.hardware import HARDWARE
from amfm.pretrain.checks.load import load_checked
from benchmarks.command import main

PRESET = "ladder_1b_a300m"
EXPECTED_WITHIN = 0.01  # of expected bytes: a simulated router's choices are draws
# Six of its blocks and 16 of its experts, so that a trace takes seconds; a row per micro-batch.
SETTINGS = (
    "model.pattern=(ME)*2 *E",
    "model.moe.num_experts=16",
    "export.target=own",
    "train.micro_batch_size=1",
    "train.global_batch_size=128",
)
SPLIT = ("parallel.tensor=2", "parallel.sequence_parallel=true")
STAGED = ("parallel.pipeline=2",)
INTERLEAVED = ("parallel.schedule=interleaved", "parallel.virtual_stages=2")
# Half of the blocks of each mixer's case are the mixer's; as wide as the preset's Mamba2.
HEADS = "num_heads=16"
# No file of ours holds an indexer.
CHOSEN, AS_IT_IS = "indexer.top_k=512", ("export.target=auto",)
WARM_UP = (*AS_IT_IS, f"model.attention.{CHOSEN}", "model.attention.indexer.stage=warm_up")
WINDOW = "{num_heads: 16, num_kv_heads: 4, window: 1024, sinks: true}"


@dataclass(frozen=True)
class Case:
    """A layout of the table: its name there, ranks, settings next to the preset's, and the simulated GPU."""

    name: str
    ranks: int
    settings: tuple[str, ...]
    gpu: str = "h100"


def of_mixer(symbol: str, section: str, *options: str, other: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Settings of a model of four blocks, every other one the mixer `section` with these options."""
    chosen = (f"model.mixers.{section}.{option}" for option in options or (HEADS,))
    return (f"model.pattern=({symbol}E)*2", *chosen, *other)


CASES = (
    Case("ZeRO 0", 8, ("parallel.zero_stage=0",)),
    Case("ZeRO 1", 8, ()),
    Case("ZeRO 2", 8, ("parallel.zero_stage=2",)),
    Case("ZeRO 3", 8, ("parallel.zero_stage=3",)),
    Case("tensor", 8, ("parallel.tensor=2",)),
    Case("tensor, sequence parallel", 8, SPLIT),
    Case("expert", 8, ("parallel.expert=4",)),
    Case("expert, capacity", 8, ("parallel.expert=4", "model.moe.capacity_factor=1.5")),
    Case(
        "expert, context, recycled choices",
        8,
        ("parallel.expert=2", "parallel.context=2", "model.moe.capacity_factor=1.5", "model.moe.overflow=recycle"),
    ),
    Case("expert, halves", 8, ("parallel.expert=4", "parallel.overlap_experts=true")),
    Case(
        "expert, two-batch overlap",
        8,
        ("parallel.expert=4", "parallel.overlap_experts=two_batch", "train.micro_batch_size=2"),
    ),
    Case(
        "expert, capacity, halves",
        8,
        ("parallel.expert=4", "parallel.overlap_experts=true", "model.moe.capacity_factor=1.5"),
    ),
    Case("expert, expert tensor", 8, (*SPLIT, "parallel.expert=2", "parallel.expert_tensor=2")),
    Case("context", 8, ("parallel.context=2",)),
    Case("pipeline", 8, STAGED),
    Case("pipeline, interleaved", 8, (*STAGED, *INTERLEAVED)),
    Case("pipeline, zero-bubble", 8, (*STAGED, "parallel.schedule=zero_bubble")),
    Case("recompute all", 8, ("train.recompute=full",)),
    Case("recompute Mamba2 and experts", 8, ("train.recompute=selective", "train.recompute_blocks=ME")),
    Case("recompute all, ZeRO 3", 8, ("train.recompute=full", "parallel.zero_stage=3")),
    Case("tensor, ZeRO 3", 16, (*SPLIT, "parallel.zero_stage=3")),
    Case("context 4, expert", 16, ("parallel.context=4", "parallel.expert=4")),
    Case("tensor, expert, pipeline", 16, (*SPLIT, "parallel.expert=4", *STAGED)),
    Case("tensor, context, expert, pipeline", 16, (*SPLIT, "parallel.context=2", "parallel.expert=2", *STAGED)),
    Case("expert, interleaved", 16, ("parallel.expert=4", *STAGED, *INTERLEAVED)),
    Case("pipeline 4", 16, ("parallel.pipeline=4",)),
    Case("expert, zero-bubble", 16, ("parallel.expert=4", *STAGED, "parallel.schedule=zero_bubble")),
    Case(
        "expert, zero-bubble, halves",
        16,
        ("parallel.expert=4", "parallel.overlap_experts=true", *STAGED, "parallel.schedule=zero_bubble"),
    ),
    Case("context, pipeline, recompute", 16, ("parallel.context=2", *STAGED, "train.recompute=full")),
    Case(
        "dense feed-forward, gates, latent experts",
        8,
        (
            "model.pattern=(M-*E)*2",
            "model.feed_forward={hidden_size: 4096, activation: swiglu}",
            "model.attention.gate=element",
            "model.attention.qk_norm=true",
            "model.attention.positions=rope",
            "model.moe.latent_size=256",
            "model.moe.shared_expert_gate=true",
        ),
    ),
    Case("fp8_block", 8, ("low_precision.recipe=fp8_block",)),
    Case(
        "fp8_block, expert, saved and sent as codes",
        8,
        (
            "parallel.expert=4",
            "model.moe.capacity_factor=1.5",
            "model.moe.expert_hidden_size=512",
            "low_precision={recipe: fp8_block, activation_storage: fp8, dispatch: fp8, quantize_weights: each_step}",
        ),
    ),
    Case("mxfp8, expert", 8, ("parallel.expert=4", "low_precision.recipe=mxfp8"), "b200"),
    Case("nvfp4, a block wide", 8, ("low_precision={recipe: nvfp4, bf16_last_layers: 1}",), "b200"),
    Case("two MTP layers", 8, ("model.pattern=(ME)*2 *E/*E/*E",)),
    Case("retnet", 8, of_mixer("{retnet}", "retnet")),
    Case("lightning", 8, of_mixer("L", "lightning")),
    Case("gla", 8, of_mixer("{gla}", "gla")),
    Case("gated deltanet", 8, of_mixer("G", "gated_deltanet")),
    Case("deltaproduct", 8, of_mixer("P", "deltaproduct")),
    Case("kda", 8, of_mixer("K", "kda")),
    Case("gdn2", 8, of_mixer("{gdn2}", "gdn2")),
    Case("mamba3", 8, of_mixer("{mamba3}", "mamba3")),
    Case("mamba1", 8, of_mixer("{mamba1}", "mamba1", "inner_size=2048")),
    Case("latent attention", 8, of_mixer("+", "mla", HEADS)),
    Case("latent attention, chosen keys", 8, of_mixer("+", "mla", HEADS, CHOSEN, other=AS_IT_IS)),
    Case("chosen keys, tensor", 8, (*SPLIT, *AS_IT_IS, f"model.attention.{CHOSEN}")),
    Case("warm-up of an indexer, context", 8, ("parallel.context=2", *WARM_UP)),
    Case("warm-up of an indexer, tensor, context", 8, (*SPLIT, "parallel.context=2", *WARM_UP)),
    Case(
        "short convolutions, windows next to Mamba2",
        8,
        ("model.pattern=CE(W&M)E", "model.mixers.short_conv={}", f"model.mixers.window={WINDOW}"),
    ),
    Case("kda, tensor, ZeRO 2", 8, of_mixer("K", "kda", other=(*SPLIT, "parallel.zero_stage=2"))),
    Case("gla, context", 8, of_mixer("{gla}", "gla", other=("parallel.context=2",))),
)  # fmt: skip


def trace_case(presets: Path, case: Case, report: Callable[[str], None]) -> list[TracedRank]:
    """Trace the first rank of the first and of the last pipeline stage of a case; `presets`: folder of the ladder."""
    config = load_checked(presets / f"{PRESET}.yaml", [*SETTINGS, *case.settings], world_size=case.ranks)
    report(f"{case.name}: {case.ranks} ranks")
    return trace_run(config, case.ranks, HARDWARE[case.gpu], only_rank=None, stage_name=None, report=lambda *_: None)


def trace_cases(presets: Path, cases: Iterable[Case], report: Callable[[str], None]) -> list[dict[str, Any]]:
    """Trace cases one after the other; a row of JSON values for each traced rank."""
    return [row_of(case, entry) for case in cases for entry in trace_case(presets, case, report)]


def row_of(case: Case, entry: TracedRank) -> dict[str, Any]:
    """What a traced rank says vs. the plan, as JSON values."""
    return {
        "case": case.name,
        "ranks": case.ranks,
        "layout": entry.layout.describe(),
        "rank": entry.rank,
        "planned_bytes": round(entry.predicted.total()),
        "traced_bytes": entry.peak_bytes,
        "error": entry.error(),
        "planned_phase": entry.predicted.phase,
        "traced_phase": entry.traced["peak_phase"],
        "bytes_by_axis": compare_bytes(entry),
        "host_waits": entry.traced["host_waits"],
        "wrong_fake_functions": entry.traced["mismatches"],
    }


def compare_bytes(entry: TracedRank) -> str:
    """Whether the rank handed to each collective of each axis what the formulas say, or what is not so.

    `equal`: to the byte. `as expected`: but for rows to experts, which the formulas give as expected of an even router, and
    those within EXPECTED_WITHIN.
    """
    planned = predicted_bytes(entry)
    if isinstance(planned, str):
        return planned
    found: dict[tuple[str, str], float] = {key: sum(sizes.values()) for key, sizes in traced_bytes(entry).items()}
    is_expected = depends_on_router(entry.config, entry.layout)
    differing = []
    for key in sorted(planned.keys() | found.keys()):
        said, seen = planned.get(key, 0.0), found.get(key, 0.0)
        room = EXPECTED_WITHIN * said if is_expected and PARTS.get(key[0]) == "expert" else 0.0
        if abs(said - seen) > room:
            differing.append(f"{key[0]} {key[1]} {seen:,.0f} of {said:,.0f}")
    return "; ".join(differing) or ("as expected" if is_expected else "equal")


def traced(
    presets: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where the presets are.")] = Path("configs"),
    *,
    only: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Only this layout of the table; may be repeated.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Trace ranks of a small model in many layouts, and print planned vs. traced memory and bytes."""
    unknown = set(only or ()) - {case.name for case in CASES}
    if unknown:
        raise ValueError(
            f"--only {unknown.pop()!r} is not a layout of the table; use one of {', '.join(case.name for case in CASES)}"
        )
    rows = trace_cases(presets, [case for case in CASES if not only or case.name in only], say)
    if as_json:
        print_json(rows)
        return
    columns = ("layout", "ranks", "rank", "planned GiB", "traced GiB", "error", "bytes by axis")
    lines = [
        (
            row["case"],
            row["ranks"],
            row["rank"],
            f"{row['planned_bytes'] / 2**30:.3f}",
            f"{row['traced_bytes'] / 2**30:.3f}",
            f"{row['error']:+.1%}",
            row["bytes_by_axis"],
        )
        for row in rows
    ]
    print_rows("Peak memory of a rank per step, and what it hands to collectives", columns, lines)
    say(f"largest error {max(abs(row['error']) for row in rows):.1%}")


if __name__ == "__main__":
    main(traced)
