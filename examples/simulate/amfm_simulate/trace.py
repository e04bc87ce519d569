"""`amfm plan --trace`: run ranks on the simulated cluster and compare what they did with the plan's estimates.

How it works: one training stage is cut down to pipeline + 1 micro-batches, enough for every phase of its schedule. For
each chosen rank a child process (`rank.py`) takes real steps on fake tensors and answers with its numbers; here they
are paired with the formulas of `launch/plan`. By default the first rank of the first and of the last pipeline stage
run: only they hold the embedding and the head.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from amfm.launch.cluster.child import Child
from amfm.launch.plan.activations import storage_of
from amfm.launch.plan.hardware import Hardware
from amfm.launch.plan.layout import Layout, held_by_stages
from amfm.launch.plan.memory import Memory, estimate_stage
from amfm.model.config.pattern import block_kind
from amfm.model.flops import block_flops, depth_projection_flops, head_flops
from amfm.pretrain.checks.parallel import micro_batch_problems
from amfm.pretrain.checks.stages import ranks_of_stage
from amfm.pretrain.config.schema import RunConfig
from amfm.pretrain.recompute import recomputed_letters
from amfm.pretrain.stages import resolve_stages

Report = Callable[[int, int, str], None]
TORCH_RELEASES = ("2.13", "2.15")  # for whose private parts examples/simulate/amfm_simulate/patches.py is written
PROGRESS_LINES = 6  # that a rank gives: start, groups, model, engine, two steps


@dataclass(frozen=True)
class TracedRank:
    """One rank's estimate and trace; `traced` is the answer of examples/simulate/amfm_simulate/rank.py."""

    rank: int
    stage: str
    config: RunConfig
    layout: Layout
    predicted: Memory
    traced: dict[str, Any]

    @property
    def peak_bytes(self) -> int:
        """Peak bytes of the second step."""
        return int(self.traced["peak_bytes"])

    @property
    def build_bytes(self) -> int:
        """Peak bytes before the first step, over building the model and the engine around it."""
        return max(self.traced["phases"][phase] for phase in ("build", "engine"))

    def held_parameters(self) -> float:
        """Parameters that the plan assigns to this rank."""
        stages = held_by_stages(self.config.model, self.layout, self.config.train.sequence_length)
        return stages[pipeline_stage(self.config, self.layout.ranks, self.rank)].parameters

    def error(self) -> float:
        """Relative error of the planned peak against the traced one; positive when the plan says more."""
        return self.predicted.total() / self.peak_bytes - 1


def trace_run(
    config: RunConfig,
    ranks: int,
    hardware: Hardware,
    *,
    only_rank: int | None,
    stage_name: str | None,
    report: Report,
    events: bool = False,
) -> list[TracedRank]:
    """Trace one rank, or by default the first rank of the first and of the last pipeline stage.

    `stage_name`: a training stage of the run; None is the first. `events`: keep what happens in order, for a timeline, by
    default of the first rank of every pipeline stage, since each waits for its neighbours. Raises ValueError for a rank or a stage that is not there
    and for what a simulated rank cannot run, RuntimeError if its process ends early.
    """
    check_torch(torch.__version__)
    config = hardware.with_precision(config)
    by_name = {stage.name: stage for stage in resolve_stages(config)}
    if stage_name is None or stage_name in by_name:
        stage = by_name[stage_name] if stage_name else resolve_stages(config)[0]
        ranks = ranks_of_stage(config, stage, range(ranks, 0, -hardware.gpus_per_node))
    traced = traced_config(config, ranks, stage_name)
    chosen = chosen_ranks(traced, ranks, only_rank, every_stage=events)
    found = []
    for number, rank in enumerate(chosen):
        settings = {
            "config": traced.model_dump(mode="json"),
            "rank": rank,
            "ranks": ranks,
            "gpus_per_node": hardware.gpus_per_node,
            "is_blackwell": hardware.mxfp8_flops is not None,
            "events": events,
        }
        result = run_child(
            settings, partial(report_progress, report, number * PROGRESS_LINES, len(chosen) * PROGRESS_LINES)
        )
        layout, predicted = Layout.of(traced, ranks), predicted_memory(traced, ranks, rank)
        found.append(TracedRank(rank, stage_name or resolve_stages(config)[0].name, traced, layout, predicted, result))
    return found


def predicted_memory(config: RunConfig, ranks: int, rank: int) -> Memory:
    """What the plan says of a rank's peak, without margin; `config` is what was traced, or would be (`traced_config`)."""
    layout = Layout.of(config, ranks)
    held = held_by_stages(config.model, layout, config.train.sequence_length, config.optimizer.matrix_settings())
    stage = held[pipeline_stage(config, ranks, rank)]
    # Sums of gradients stay as graphs need them, but no pass is captured.
    return estimate_stage(config, layout, storage_of(config), stage, 1.0, is_captured=False)


def check_torch(version: str) -> None:
    """Reject releases of torch whose private parts the patches do not know. Raises ValueError."""
    if ".".join(version.split(".")[:2]) not in TORCH_RELEASES:
        raise ValueError(
            f"--trace is written for torch {', '.join(TORCH_RELEASES)}, and this is {version}: it replaces private parts of "
            "torch; install a supported release, or plan without --trace"
        )


def report_progress(report: Report, before: int, lines: int, done: int, what: str) -> None:
    """Report one rank's progress as part of all ranks' progress."""
    report(before + done, lines, what)


def traced_config(config: RunConfig, ranks: int, stage_name: str | None) -> RunConfig:
    """One training stage as a run, with pipeline + 1 micro-batches (more where its schedule asks, fewer where it has fewer).

    Blocks are traced as written: `train.compile` is off. Raises ValueError for an unknown stage.
    """
    stages = resolve_stages(config)
    names = [stage.name for stage in stages]
    if stage_name is not None and stage_name not in names:
        raise ValueError(f"--stage {stage_name} is not a training stage of this run; use one of {', '.join(names)}")
    run = stages[names.index(stage_name) if stage_name else 0].config
    unit = run.train.micro_batch_size * run.parallel.data_ranks(ranks)
    most = run.train.global_batch_size // unit
    for count in range(min(most, run.parallel.pipeline + 1), most + 1):
        updates = {"global_batch_size": count * unit, "batch_ramp": None, "compile": False}
        section = run.run.model_copy(update={"initial_weights": None})
        # As the plan, without a teacher.
        traced = run.model_copy(update={"train": run.train.model_copy(update=updates), "run": section, "distill": None})
        if not any(micro_batch_problems(traced, ranks)):
            return traced
    raise AssertionError("check_run was not called: no number of micro-batches suits the schedule")


def chosen_ranks(config: RunConfig, ranks: int, only: int | None, *, every_stage: bool = False) -> list[int]:
    """The rank asked for, else the first of the first and of the last pipeline stage, or of every one.

    Raises ValueError for a rank that is not there.
    """
    if only is None:
        pipeline = config.parallel.pipeline
        stages = range(pipeline) if every_stage else {0, pipeline - 1}
        return sorted(stage * (ranks // pipeline) for stage in stages)
    if not 0 <= only < ranks:
        raise ValueError(f"--rank {only} is not among the {ranks} ranks of --gpus; use 0 to {ranks - 1}")
    return [only]


def pipeline_stage(config: RunConfig, ranks: int, rank: int) -> int:
    """Pipeline stage of a rank; pipeline is the outermost axis."""
    return rank // (ranks // config.parallel.pipeline)


def run_child(settings: dict[str, Any], report: Callable[[int, str], None]) -> dict[str, Any]:
    """Trace one rank in a separate process. Raises ValueError with what that rejects."""
    rank = settings["rank"]
    report(0, f"rank {rank}: imports")
    with Child("amfm_simulate.rank", quiet=True) as child:
        child.start(json.dumps(settings))
        done = 0
        while True:
            answer = child.receive()
            if "refused" in answer:
                raise ValueError(answer["refused"])
            if "result" in answer:
                result: dict[str, Any] = answer["result"]
                return result
            done += 1
            report(done, f"rank {rank}: {answer['progress']}, {answer['seconds']:.0f} s")


def predicted_flops(entry: TracedRank) -> dict[str, float]:
    """FLOPs of a step on this rank by kind, as MFU counts them, and a third more where blocks are recomputed."""
    config, layout = entry.config, entry.layout
    tokens = layout.tokens(config) * layout.micro_batches(config) / layout.tensor
    stage = pipeline_stage(config, layout.ranks, entry.rank)
    held = held_by_stages(config.model, layout, config.train.sequence_length)[stage]
    again = recomputed_letters(config)
    flops: dict[str, float] = dict.fromkeys(map(block_kind, held.letters), 0.0)
    for symbol in held.letters:
        times = 4 / 3 if symbol in again else 1
        flops[block_kind(symbol)] += times * tokens * block_flops(config.model, symbol, config.train.sequence_length)
    if held.has_head:
        # Projections of MTP layers stand between two heads.
        between = held.depths * depth_projection_flops(config.model)
        flops["head"] = tokens * (held.heads * head_flops(config.model) + between)
    return flops


def traced_flops(entry: TracedRank) -> dict[str, float]:
    """FLOPs of the traced step by kind: every product, those of recomputation and inside kernels too."""
    found: Counter[str] = Counter()
    for kind, flops in entry.traced["flops"].items():
        found[kind_of(kind)] += flops
    return dict(found)


def kind_of(place: str) -> str:
    """Kind of a block by its letter; other places of a step keep their names."""
    return place if place in ("embedding", "head", "step") else block_kind(place)


def predicted_bytes(entry: TracedRank) -> dict[tuple[str, str], float] | str:
    """Bytes that a rank of this pipeline stage hands to collectives, by (axis, collective); or why there is no formula."""
    planned = entry.traced["planned_traffic"]
    if isinstance(planned, str):
        return planned
    found: dict[tuple[str, str], float] = {}
    for axis, collective, size in planned:
        found[axis, collective] = found.get((axis, collective), 0.0) + size
    return found


def traced_bytes(entry: TracedRank) -> dict[tuple[str, str], dict[str, int]]:
    """Bytes that this rank handed in, by (axis, collective): in the passes, and once per step."""
    found: dict[tuple[str, str], dict[str, int]] = {}
    for row in entry.traced["traffic"]:
        place = found.setdefault((row["axis"], row["collective"]), {"passes": 0, "once a step": 0})
        place[row["when"]] += row["bytes"]
    return found


def launches_a_block(traced: dict[str, Any], which: str) -> dict[str, float]:
    """Mean launches of one pass ("forward" or "backward") through a block, by kind; its norm and recomputation included."""
    return {
        kind_of(symbol): launches / traced["passes"][symbol]
        for symbol, launches in traced["launches_by_pass"][which].items()
        if traced["passes"].get(symbol)
    }


def trace_as_dict(entry: TracedRank) -> dict[str, Any]:
    """One rank as JSON values: bytes, FLOPs and counts."""
    traced = entry.traced
    by_axis: dict[str, dict[str, dict[str, int]]] = {}
    for (axis, collective), sizes in traced_bytes(entry).items():
        by_axis.setdefault(axis, {})[collective] = sizes
    return {
        "rank": entry.rank,
        "stage": entry.stage,
        "pipeline_stage": pipeline_stage(entry.config, entry.layout.ranks, entry.rank),
        "micro_batches": traced["micro_batches"],
        "predicted_bytes": round(entry.predicted.total()),
        "traced_bytes": entry.peak_bytes,
        "build_bytes": entry.build_bytes,
        "predicted_by_part": {name: round(size) for name, size in entry.predicted.parts.items()},
        "traced_by_phase": traced["phases"],
        "traced_by_line": traced["by_line"],
        "parameters": traced["parameters"],
        "held_bytes": traced["held_bytes"],
        "bytes_by_axis": by_axis,
        "flops": traced_flops(entry),
        "predicted_flops": predicted_flops(entry),
        "launches": traced["launches"],
        "launches_a_block": {name: launches_a_block(traced, name) for name in ("forward", "backward")},
        "host_waits": traced["host_waits"],
        "kernels_compiled": traced["compiled"],
        "capture": {kind_of(place): passes for place, passes in traced["capture"].items() if place != "step"},
        "fake_functions_compared": traced["compared"],
        "fake_functions_wrong": traced["mismatches"],
    }
