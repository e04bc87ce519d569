"""Memory, time and throughput of one layout of one training stage, and why it does not fit where it does not.

The smallest unit of a plan: `memory.py` and `time.py` know parts, here they become one answer, which a search ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from amfm.launch.plan.activations import storage_of
from amfm.launch.plan.expert_time import Meanwhile
from amfm.launch.plan.hardware import GIB, Hardware
from amfm.launch.plan.layout import Layout
from amfm.launch.plan.low_precision import narrow_flops_per_token
from amfm.launch.plan.memory import Memory, estimate_memory
from amfm.launch.plan.time import StepTime, estimate_step
from amfm.model.flops import flops_per_token
from amfm.pretrain.config.schema import RunConfig


@dataclass(frozen=True)
class Assumptions:
    """Inputs of the estimates that no configuration states, all fractions or ratios.

    `margin`: memory added for fragmentation and small allocations. `overlap`: part of ZeRO-3's gathers and of pipeline
    sends that hides behind compute. `imbalance`: routed rows of the most loaded expert rank over the mean. `sent_rows`: of the
    rows that amfm sends to experts, a token's to each rank once, the part that is sent; less than 1 where a dispatcher sends
    it once to a node. `meanwhile`: what is computed while they are sent, of amfm the shared expert. `repeats`: exchanges of a
    forward pass that recomputation makes again, 0 to 2. `drains`: times that a pipeline fills and drains in a step.
    `failures_per_day`: of the whole allocation, None: goodput is not asked for; `storage_bytes_per_second`: of the store of
    checkpoints, all ranks together, None: as `launch/plan/failures/goodput.py` assumes.
    """

    margin: float = 0.1
    overlap: float = 0.5
    imbalance: float = 1.2
    sent_rows: float = 1.0
    meanwhile: Meanwhile = "shared"
    repeats: int = 0
    drains: int = 1
    failures_per_day: float | None = None
    storage_bytes_per_second: float | None = None


SPREAD = 1.2  # by which efficiencies and costs may be better or worse than assumed
WORST_IMBALANCE = 1.25  # times the expected one


class Scenario(NamedTuple):
    """One end of a range, or what is expected: its MFU and seconds, and what it assumes in words."""

    name: str
    mfu: float
    seconds: float
    assumes: str


@dataclass(frozen=True)
class Estimate:
    """Memory, time and throughput of one layout. `reason` says why it does not fit; empty when it does.

    `train`: the keys of the `train` section that the layout decides. `mfu` counts model FLOPs (recomputation left out)
    against the dense peak of all ranks, which is that of bf16 whatever products take; `mfu_mixed` counts each product against
    the peak of its own precision, None if all have one. `tokens_per_second` is of the whole run. `mfu_range`: where it was
    asked for.
    """

    layout: Layout
    memory: Memory
    step: StepTime
    mfu: float
    tokens_per_second: float
    reason: str
    train: dict[str, Any]
    mfu_range: tuple[Scenario, ...] = ()
    mfu_mixed: float | None = None

    def fits(self) -> bool:
        """Whether the most loaded rank's bytes fit the device's memory."""
        return not self.reason


def memory_of(config: RunConfig, layout: Layout, assumptions: Assumptions, hardware: Hardware | None = None) -> Memory:
    """Peak memory of the most loaded rank of a run that is one training stage."""
    storage = storage_of(config)
    margin, imbalance = assumptions.margin, assumptions.imbalance
    return estimate_memory(config, layout, storage, margin=margin, imbalance=imbalance, hardware=hardware)


def estimate(
    config: RunConfig, layout: Layout, hardware: Hardware, assumptions: Assumptions, memory: Memory | None = None
) -> Estimate:
    """Memory and time of one layout; the configuration is a run without stages. `memory`: what `memory_of` says, where it was asked."""
    storage = storage_of(config)
    memory = memory or memory_of(config, layout, assumptions, hardware)
    step = estimate_step(
        config,
        layout,
        hardware,
        storage,
        overlap=assumptions.overlap,
        imbalance=assumptions.imbalance,
        sent_rows=assumptions.sent_rows,
        meanwhile=assumptions.meanwhile,
        repeats=assumptions.repeats,
        drains=assumptions.drains,
    )
    if config.distill is not None:
        from amfm.launch.plan.teacher import with_teacher  # where one teaches

        step = with_teacher(step, config, layout, hardware, storage, assumptions.imbalance)
    train = config.train
    tokens = train.global_batch_size * train.sequence_length
    flops = sum(flops_per_token(config.model, train.sequence_length).values())
    seconds = step.total()
    mfu = flops * tokens / layout.ranks / seconds / hardware.peak_flops(train.precision)
    mixed = mixed_peak_seconds(config, hardware)
    return Estimate(
        layout,
        memory,
        step,
        mfu,
        tokens / seconds,
        explain_misfit(memory, hardware),
        layout.train_settings(config.model),
        mfu_mixed=None if mixed is None else mixed * tokens / layout.ranks / seconds,
    )


def mixed_peak_seconds(config: RunConfig, hardware: Hardware) -> float | None:
    """Seconds of a token's FLOPs if each ran at the peak of its own precision; None if all run in the run's."""
    narrow = narrow_flops_per_token(config.model, config.low_precision)
    if not narrow:
        return None
    flops = sum(flops_per_token(config.model, config.train.sequence_length).values())
    seconds = (flops - sum(narrow.values())) / hardware.peak_flops(config.train.precision)
    return seconds + sum(part / hardware.recipe_peak(recipe) for recipe, part in narrow.items())


def mfu_range(
    config: RunConfig, layout: Layout, hardware: Hardware, assumptions: Assumptions
) -> tuple[Scenario, Scenario, Scenario]:
    """The MFU that the assumptions give, and below and above it that of worse and better ones, each with what it assumes."""
    found = []
    for name, factor, imbalance in (
        ("low", 1 / SPREAD, WORST_IMBALANCE * assumptions.imbalance),
        ("expected", 1.0, assumptions.imbalance),
        ("high", SPREAD, 1.0),
    ):
        machine = hardware.scaled(factor)
        item = estimate(config, layout, machine, replace(assumptions, imbalance=imbalance))
        products, grouped = machine.product_efficiency, machine.grouped_efficiency
        words = f"GEMMs at {products:.0%} of the peak, grouped ones at {grouped:.0%}, the most loaded rank at {imbalance:.2f}"
        found.append(Scenario(name, item.mfu, item.step.total(), words))
    return found[0], found[1], found[2]


def explain_misfit(memory: Memory, hardware: Hardware) -> str:
    """Why a layout does not fit, naming its largest part; empty when it fits."""
    room = hardware.memory_gib * GIB
    if memory.total() <= room:
        return ""
    name, size = max(memory.parts.items(), key=lambda part: part[1])
    return (
        f"needs {memory.total() / GIB:,.1f} GiB of {hardware.memory_gib:,.1f}; most of it {name}, {size / GIB:,.1f} GiB"
    )


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
            **({} if item.mfu_mixed is None else {"mfu_mixed": item.mfu_mixed}),
            "tokens_per_second": item.tokens_per_second,
            "tokens_per_second_per_gpu": item.tokens_per_second / item.layout.ranks,
            "compute_seconds": step.compute,
            "communication_seconds": step.communication,
            "bubble_seconds": step.bubble,
            "optimizer_seconds": step.optimizer,
            "reduction_seconds": step.reduction,
            "hidden_seconds": step.hidden,
            "beside_experts_seconds": step.hidden_experts,
            "exposed_gather_seconds": step.exposed_gathers,
            "host_seconds": step.host,
            "multiprocessor_seconds": step.shared,
            "jitter_seconds": step.jitter,
            **({"mfu_range": {each.name: each.mfu for each in item.mfu_range}} if item.mfu_range else {}),
        },
    }
