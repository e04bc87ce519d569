"""What a run will cost before anything is rented: its size, memory, time, and which layouts fit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from launch.plan_hardware import GIB, Hardware
from launch.plan_memory import Layout, Memory, estimate_memory, lasting_bytes, storage_of
from launch.plan_time import StepTime, estimate_step
from model.flops import Counts, count_parameters, flops_per_token
from pretrain.config import RunConfig
from pretrain.stages import resolve_stages

ZERO_STAGES = (0, 1, 2, 3)
SECONDS_A_DAY = 86_400


@dataclass(frozen=True)
class Assumptions:
    """Inputs of the estimates that no configuration says."""

    margin: float = 0.1
    overlap: float = 0.5


@dataclass(frozen=True)
class Estimate:
    """One layout: what it needs and how fast it is. `reason` says why it does not fit; empty: it fits."""

    layout: Layout
    memory: Memory
    step: StepTime
    mfu: float
    tokens_per_second: float
    reason: str

    def fits(self) -> bool:
        """Whether a rank's bytes are fewer than the device's."""
        return not self.reason


@dataclass(frozen=True)
class Plan:
    """Everything `amfm plan` says."""

    config: RunConfig
    hardware: Hardware
    counts: Counts
    flops: dict[str, float]
    own: Estimate
    layouts: tuple[Estimate, ...]
    near_misses: tuple[Estimate, ...]
    tokens: float

    def seconds(self) -> float:
        """Of the whole run in the configuration's own layout."""
        return self.tokens / self.own.tokens_per_second


def make_plan(
    config: RunConfig, hardware: Hardware, ranks: int, assumptions: Assumptions, *, tokens: float | None = None
) -> Plan:
    """Estimate a configuration that `check_run` passed for `ranks` ranks. `tokens`: of the run; None: as configured."""
    train = config.train
    own = Layout(ranks, config.parallel.zero_stage, train.micro_batch_size)
    everything = [estimate(config, layout, hardware, assumptions) for layout in possible_layouts(config, ranks)]
    fitting = sorted((item for item in everything if item.fits()), key=lambda item: item.step.total())
    misses = sorted((item for item in everything if not item.fits()), key=lambda item: item.memory.total())
    return Plan(
        config=config,
        hardware=hardware,
        counts=count_parameters(config.model),
        flops=flops_per_token(config.model, train.sequence_length),
        own=estimate(config, own, hardware, assumptions),
        layouts=tuple(fitting),
        near_misses=tuple(misses[:3]),
        tokens=tokens or float(sum(stage.num_tokens() for stage in resolve_stages(config))),
    )


def possible_layouts(config: RunConfig, ranks: int) -> list[Layout]:
    """Every ZeRO stage with every micro-batch size that shares the global batch evenly."""
    rows = config.train.global_batch_size // ranks
    sizes = [size for size in range(1, min(rows, 64) + 1) if rows % size == 0]
    return [Layout(ranks, stage, size) for stage in ZERO_STAGES for size in sizes]


def estimate(config: RunConfig, layout: Layout, hardware: Hardware, assumptions: Assumptions) -> Estimate:
    """Memory and time of one layout."""
    storage = storage_of(config)
    memory = estimate_memory(config, layout, storage, margin=assumptions.margin)
    step = estimate_step(config, layout, hardware, storage, overlap=assumptions.overlap)
    train = config.train
    tokens = train.global_batch_size * train.sequence_length
    flops = sum(flops_per_token(config.model, train.sequence_length).values())
    seconds = step.total()
    mfu = flops * tokens / layout.ranks / seconds / hardware.peak_flops(train.precision)
    reason = explain_misfit(memory, hardware)
    return Estimate(layout, memory, step, mfu, tokens / seconds, reason)


def explain_misfit(memory: Memory, hardware: Hardware) -> str:
    """Why a layout does not fit; empty if it does."""
    room = hardware.memory_gib * GIB
    if memory.total() <= room:
        return ""
    name, size = max(memory.parts.items(), key=lambda part: part[1])
    return (
        f"needs {memory.total() / GIB:,.1f} GiB of {hardware.memory_gib:,.1f}; most of it {name}, {size / GIB:,.1f} GiB"
    )


def advise(plan: Plan) -> str:
    """What to do when no layout fits, or the own one does not; empty when it does."""
    if plan.own.fits():
        return ""
    if plan.layouts:
        best = plan.layouts[0].layout
        return (
            f"this layout does not fit; use parallel.zero_stage={best.zero_stage} "
            f"train.micro_batch_size={best.micro_batch_size}"
        )
    return explain_no_layout(plan)


def explain_no_layout(plan: Plan) -> str:
    """Which parts keep every layout out, and what would have to be cut."""
    room = plan.hardware.memory_gib * GIB
    nearest = plan.near_misses[0]
    parts, rows = nearest.memory.parts, nearest.layout.micro_batch_size
    by_rows = parts.get("activations", 0.0) + parts.get("working space", 0.0)
    storage = storage_of(plan.config)
    # What no number of ranks and rows takes away.
    fixed = sum(lasting_bytes(plan.counts.total, nearest.layout, storage).values())
    fixed += storage.element_bytes * plan.counts.total
    causes = []
    if fixed > room:
        causes.append(
            f"{fixed / GIB:,.1f} GiB of states and gradients stay whatever the rows are (each rank holds all gradients at "
            "any ZeRO stage, so more ranks hardly help): the model has to be cut by tensor, expert or pipeline "
            "parallelism, which this version does not have"
        )
    if by_rows / rows > room:
        causes.append(
            f"activations of one row are {by_rows / rows / GIB:,.1f} GiB: use a shorter train.sequence_length "
            "(recomputation and context parallelism are not in this version)"
        )
    if not causes:
        causes.append(
            "states, gradients and rows together are too much: use larger devices, or as many ranks as the step has "
            "micro-batches, which spares the float32 sums of gradients"
        )
    layout = f"zero_stage={nearest.layout.zero_stage}, micro_batch_size={rows}"
    return f"no layout of ZeRO alone fits {plan.hardware.name}; the nearest ({layout}) {nearest.reason}. " + "; ".join(
        causes
    )


def plan_as_dict(plan: Plan) -> dict[str, Any]:
    """The plan for scripts."""
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
        "run": {
            "tokens": plan.tokens,
            "tokens_per_day": plan.own.tokens_per_second * SECONDS_A_DAY,
            "days": seconds / SECONDS_A_DAY,
            "gpu_hours": seconds / 3600 * plan.own.layout.ranks,
        },
        "advice": advise(plan),
        "layouts": [estimate_as_dict(item) for item in plan.layouts],
        "near_misses": [estimate_as_dict(item) for item in plan.near_misses],
    }


def estimate_as_dict(item: Estimate) -> dict[str, Any]:
    """One layout for scripts."""
    step = item.step
    return {
        "parallel": {"zero_stage": item.layout.zero_stage},
        "train": {"micro_batch_size": item.layout.micro_batch_size},
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
            "optimizer_seconds": step.optimizer,
            "reduction_seconds": step.reduction,
            "exposed_gather_seconds": step.exposed_gathers,
        },
    }
