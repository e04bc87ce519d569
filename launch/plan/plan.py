"""What a run will cost before anything is rented: its size, memory, time, and which layouts fit.

How it works: a layout (`layout.py`) says how many ranks each axis has and what one rank of every pipeline stage holds.
From that and the configuration alone `memory.py` adds up the bytes of the fullest rank and `time.py` the seconds of the
slowest stage: operations at their roofline (`hardware.py`), collectives by the bytes of `exchanges.py` on the declared
links. `search.py` lists layouts that obey every rule of a run; here they are estimated, ranked and explained.

Why formulas: nothing is allocated and no model is built, so that a laptop plans 2,048 cards and a search tries thousands
of layouts. What formulas leave out is stated (`Assumptions`) and measured: `amfm bench memory` holds the memory against
real steps, `amfm bench communication` the bytes, `amfm bench calibrate` and `amfm bench plan` the time.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from launch.plan.hardware import GIB, Hardware
from launch.plan.layout import Layout, held_by_stages
from launch.plan.memory import Memory, estimate_memory, persistent_bytes, storage_of
from launch.plan.search import all_layouts, is_allowed, neighbour_layouts, recomputed, with_layout
from launch.plan.time import StepTime, estimate_step
from model.flops import Counts, count_parameters, flops_per_token
from pretrain.checks.stages import run_of_stage
from pretrain.config.schema import RunConfig
from pretrain.stages import RunStage, resolve_stages

SECONDS_A_DAY = 86_400
NEAR_MISSES = 3
KEPT_PARTS = ("weights", "masters", "moments", "gradients")  # that no recomputation spares


@dataclass(frozen=True)
class Assumptions:
    """Inputs of the estimates that no configuration states, all fractions or ratios.

    `margin`: memory added for fragmentation and small allocations. `overlap`: part of ZeRO-3's gathers and of pipeline
    sends that hides behind compute. `imbalance`: routed rows of the fullest expert rank over the mean.
    """

    margin: float = 0.1
    overlap: float = 0.5
    imbalance: float = 1.0


@dataclass(frozen=True)
class Estimate:
    """Memory, time and throughput of one layout. `reason` says why it does not fit; empty when it does.

    `train`: the keys of the `train` section that the layout decides. `mfu` counts model FLOPs (recomputation left out)
    against the dense peak of all ranks; `tokens_per_second` is of the whole run.
    """

    layout: Layout
    memory: Memory
    step: StepTime
    mfu: float
    tokens_per_second: float
    reason: str
    train: dict[str, Any]

    def fits(self) -> bool:
        """Whether the fullest rank's bytes fit the device's memory."""
        return not self.reason


@dataclass(frozen=True)
class StageEstimate:
    """Estimate of one training stage in the configuration's own layout."""

    stage: RunStage
    estimate: Estimate

    def seconds(self) -> float:
        """Seconds of the whole stage; steps of a batch ramp count as full ones."""
        return self.stage.num_steps * self.estimate.step.total()


@dataclass(frozen=True)
class Plan:
    """Everything that `amfm plan` prints; `own` is the first training stage in the configuration's own layout.

    `is_own`: False where that layout breaks a rule for so many ranks, and the best one found takes its place. `tokens`
    may differ from the configuration's where the user asked for another number; stages are scaled in proportion.
    """

    config: RunConfig
    hardware: Hardware
    counts: Counts
    flops: dict[str, float]
    stages: tuple[StageEstimate, ...]
    layouts: tuple[Estimate, ...]
    near_misses: tuple[Estimate, ...]
    is_own: bool
    tokens: float

    @property
    def own(self) -> Estimate:
        """Estimate of the first training stage."""
        return self.stages[0].estimate

    def seconds(self) -> float:
        """Seconds of the whole run in the configuration's own layout, scaled to `tokens`."""
        declared = sum(entry.stage.num_tokens() for entry in self.stages)
        return sum(entry.seconds() for entry in self.stages) * self.tokens / declared


def make_plan(
    config: RunConfig,
    hardware: Hardware,
    ranks: int,
    assumptions: Assumptions,
    *,
    tokens: float | None = None,
    search: bool = False,
) -> Plan:
    """Plan a configuration that `check_run` passed for `ranks` ranks.

    `tokens`: of the run; None: as configured. `search`: over all axes, not only ZeRO stages and micro-batch sizes; then
    the configuration's own layout need not suit so many ranks. Raises ValueError where no layout obeys all rules, and
    for an optimizer in the host's memory, which is not modelled.
    """
    if config.parallel.offload_optimizer:
        raise ValueError(
            "parallel.offload_optimizer=true is not modelled: the plan counts masters, moments and the optimizer's step on "
            "the device; plan with false"
        )
    stages = resolve_stages(config)
    runs = [run_of_stage(config, stage) for stage in stages]
    found = all_layouts(runs[0], ranks, hardware.gpus_per_node) if search else neighbour_layouts(runs[0], ranks)
    fitting, misses = rank_layouts(config, runs, found, hardware, assumptions, recomputes=search)
    is_own = all(is_allowed(run, ranks) for run in runs)
    if not is_own:
        if not (fitting or misses):
            raise ValueError(f"no layout of {config.parallel!r} or any other obeys all rules for {ranks} ranks")
        best = (*fitting, *misses)[0].layout
        runs = [with_layout(run, at_stage(best, config, index, run)) for index, run in enumerate(runs)]
    own = [estimate(run, Layout.of(run, ranks), hardware, assumptions) for run in runs]
    return Plan(
        config=config,
        hardware=hardware,
        counts=count_parameters(config.model),
        flops=flops_per_token(config.model, stages[0].sequence_length),
        stages=tuple(StageEstimate(stage, item) for stage, item in zip(stages, own)),
        layouts=fitting,
        near_misses=misses,
        is_own=is_own,
        tokens=tokens or float(sum(stage.num_tokens() for stage in stages)),
    )


def rank_layouts(
    config: RunConfig,
    runs: list[RunConfig],
    layouts: Iterable[Layout],
    hardware: Hardware,
    assumptions: Assumptions,
    *,
    recomputes: bool,
) -> tuple[tuple[Estimate, ...], tuple[Estimate, ...]]:
    """Layouts that suit and fit every training stage, fastest in the first stage first; and the nearest misses.

    `recomputes`: a layout that does not fit is tried again with more blocks recomputed.
    """
    fitting: list[Estimate] = []
    misses: list[tuple[Layout, Memory, str]] = []
    room = hardware.memory_gib * GIB
    for layout in layouts:
        for option in recomputed(runs[0], layout) if recomputes else (layout,):
            memory, reason = memory_of_stages(config, runs, option, hardware, assumptions)
            # Stop at the first option that fits, or when recomputation cannot help because what it never frees is too
            # much alone.
            if not reason or sum(memory.parts.get(name, 0.0) for name in KEPT_PARTS) > room:
                break
        if reason:
            misses.append((option, memory, reason))
        else:
            fitting.append(estimate(runs[0], option, hardware, assumptions))
    fitting.sort(key=lambda item: item.step.total())
    misses.sort(key=lambda miss: (miss[1].total() <= room, miss[1].total()))  # broken rules last
    nearest = [
        replace(estimate(runs[0], layout, hardware, assumptions), memory=memory, reason=reason)
        for layout, memory, reason in misses[:NEAR_MISSES]
    ]
    return tuple(fitting), tuple(nearest)


def memory_of_stages(
    config: RunConfig, runs: list[RunConfig], layout: Layout, hardware: Hardware, assumptions: Assumptions
) -> tuple[Memory, str]:
    """Memory in the first training stage, or in the first stage that the layout does not suit, with the reason."""
    found: tuple[Memory, str] | None = None
    for index, run in enumerate(runs):
        here = at_stage(layout, config, index, run) if index else layout
        stage = f"stage {config.stages[index].name} " if index else ""
        if found is not None and not is_allowed(with_layout(run, here), layout.ranks):
            return found[0], f"{stage}breaks a rule in this layout"
        memory = memory_of(run, here, assumptions)
        reason = explain_misfit(memory, hardware)
        if reason:
            return memory, stage + reason
        found = found or (memory, "")
    assert found is not None, "a run has a stage"
    return found


def memory_of(config: RunConfig, layout: Layout, assumptions: Assumptions) -> Memory:
    """Peak memory of the fullest rank of a run that is one training stage."""
    storage = storage_of(config)
    return estimate_memory(config, layout, storage, margin=assumptions.margin, imbalance=assumptions.imbalance)


def at_stage(layout: Layout, config: RunConfig, index: int, run: RunConfig) -> Layout:
    """The first stage's layout with a later stage's micro-batch size, where one was declared up to there."""
    is_declared = any(section.micro_batch_size for section in config.stages[1 : index + 1])
    return replace(layout, micro_batch_size=run.train.micro_batch_size) if is_declared else layout


def estimate(config: RunConfig, layout: Layout, hardware: Hardware, assumptions: Assumptions) -> Estimate:
    """Memory and time of one layout; the configuration is a run without stages."""
    storage = storage_of(config)
    memory = memory_of(config, layout, assumptions)
    step = estimate_step(
        config, layout, hardware, storage, overlap=assumptions.overlap, imbalance=assumptions.imbalance
    )
    train = config.train
    tokens = train.global_batch_size * train.sequence_length
    flops = sum(flops_per_token(config.model, train.sequence_length).values())
    seconds = step.total()
    mfu = flops * tokens / layout.ranks / seconds / hardware.peak_flops(train.precision)
    reason = explain_misfit(memory, hardware)
    return Estimate(layout, memory, step, mfu, tokens / seconds, reason, layout.train_settings(config.model))


def explain_misfit(memory: Memory, hardware: Hardware) -> str:
    """Why a layout does not fit, naming its largest part; empty when it fits."""
    room = hardware.memory_gib * GIB
    if memory.total() <= room:
        return ""
    name, size = max(memory.parts.items(), key=lambda part: part[1])
    return (
        f"needs {memory.total() / GIB:,.1f} GiB of {hardware.memory_gib:,.1f}; most of it {name}, {size / GIB:,.1f} GiB"
    )


def advise(plan: Plan) -> str:
    """What to do when a stage does not fit in the configuration's own layout; empty when all do."""
    misfits = [entry for entry in plan.stages if not entry.estimate.fits()]
    if not misfits:
        return ""
    where = f"stage {misfits[0].stage.name} of " if len(plan.stages) > 1 else ""
    if plan.layouts:
        best = plan.layouts[0].layout.describe()
        return f"{where}this layout does not fit; fits: {best}"
    return where + explain_no_layout(plan)


def explain_no_layout(plan: Plan) -> str:
    """Why every layout is out of memory, and which part of the model or batch would have to shrink."""
    if not plan.near_misses:
        return "no layout obeys all rules for so many ranks; see `amfm config CONFIG --ranks N`"
    room = plan.hardware.memory_gib * GIB
    nearest = plan.near_misses[0]
    parts, layout = nearest.memory.parts, nearest.layout
    by_rows = parts.get("activations", 0.0) + parts.get("working space", 0.0)
    storage = storage_of(plan.config)
    held = max(
        held_by_stages(plan.config.model, layout, plan.stages[0].stage.sequence_length),
        key=lambda entry: entry.parameters,
    )
    # What no number of data ranks and rows takes away.
    fixed = sum(persistent_bytes(held, layout, storage).values()) + storage.element_bytes * held.parameters
    causes = []
    if fixed > room:
        causes.append(
            f"{fixed / GIB:,.1f} GiB of states and gradients stay whatever the rows are (each rank holds the gradients of "
            "all its weights at any ZeRO stage): cut the model by parallel.tensor, expert or pipeline; --search finds how"
        )
    if by_rows / layout.micro_batch_size > room:
        causes.append(
            f"activations of one row are {by_rows / layout.micro_batch_size / GIB:,.1f} GiB: use train.recompute=full, "
            "parallel.context, or a shorter train.sequence_length"
        )
    if not causes:
        causes.append(
            "states, gradients and rows together are too much: use larger devices, train.recompute, or as many ranks as "
            "the step has micro-batches, which spares the float32 sums of gradients"
        )
    return (
        f"no layout that was tried fits {plan.hardware.name}; the nearest ({layout.describe()}) {nearest.reason}. "
        + "; ".join(causes)
    )


def plan_as_dict(plan: Plan) -> dict[str, Any]:
    """The plan as JSON values: bytes, seconds, days and ratios, as `amfm plan --json` prints them."""
    seconds = plan.seconds()
    return {
        "gpus": plan.own.layout.ranks,
        "gpu": plan.hardware.name,
        "parameters": {
            "total": plan.counts.total,
            "active": plan.counts.active,
            "total_by_kind": plan.counts.total_by_kind,
            "active_by_kind": plan.counts.active_by_kind,
        },
        "flops_per_token": sum(plan.flops.values()),
        "flops_per_token_by_kind": plan.flops,
        **estimate_as_dict(plan.own),
        "stages": [
            {
                "name": entry.stage.name,
                "steps": entry.stage.num_steps,
                "tokens": entry.stage.num_tokens(),
                "sequence_length": entry.stage.sequence_length,
                "days": entry.seconds() / SECONDS_A_DAY,
                **estimate_as_dict(entry.estimate),
            }
            for entry in plan.stages
        ],
        "run": {
            "tokens": plan.tokens,
            "tokens_per_day": plan.tokens / seconds * SECONDS_A_DAY,
            "days": seconds / SECONDS_A_DAY,
            "gpu_hours": seconds / 3600 * plan.own.layout.ranks,
        },
        "advice": advise(plan),
        "layouts": [estimate_as_dict(item) for item in plan.layouts],
        "near_misses": [estimate_as_dict(item) for item in plan.near_misses],
    }


def estimate_as_dict(item: Estimate) -> dict[str, Any]:
    """One layout as JSON values, bytes rounded to integers."""
    step = item.step
    return {
        "parallel": item.layout.settings(),
        "train": item.train,
        "fits": item.fits(),
        "reason": item.reason,
        "memory": {
            "total_bytes": round(item.memory.total()),
            "by_part": {name: round(size) for name, size in item.memory.parts.items()},
            "fullest_in": item.memory.phase,
        },
        "step": {
            "seconds": step.total(),
            "mfu": item.mfu,
            "tokens_per_second": item.tokens_per_second,
            "tokens_per_second_per_gpu": item.tokens_per_second / item.layout.ranks,
            "compute_seconds": step.compute,
            "communication_seconds": step.communication,
            "bubble_seconds": step.bubble,
            "optimizer_seconds": step.optimizer,
            "reduction_seconds": step.reduction,
            "exposed_gather_seconds": step.exposed_gathers,
        },
    }
