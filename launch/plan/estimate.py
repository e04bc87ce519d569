"""Memory, time and throughput of one layout of one training stage, and why it does not fit where it does not.

The smallest unit of a plan: `memory.py` and `time.py` know parts, here they become one answer, which a search ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from amfm.launch.plan.hardware import GIB, Hardware
from amfm.launch.plan.layout import Layout
from amfm.launch.plan.memory import Memory, estimate_memory, storage_of
from amfm.launch.plan.time import StepTime, estimate_step
from amfm.model.flops import flops_per_token
from amfm.pretrain.config.schema import RunConfig


@dataclass(frozen=True)
class Assumptions:
    """Inputs of the estimates that no configuration states, all fractions or ratios.

    `margin`: memory added for fragmentation and small allocations. `overlap`: part of ZeRO-3's gathers and of pipeline
    sends that hides behind compute. `imbalance`: routed rows of the fullest expert rank over the mean. `sent_rows`: of the
    rows that amfm sends to experts, a token's to each rank once, the part that travels; less than 1 where a dispatcher sends
    it once to a node. `overlaps_experts`: whether they travel beside what the blocks compute, as amfm's do.
    """

    margin: float = 0.1
    overlap: float = 0.5
    imbalance: float = 1.0
    sent_rows: float = 1.0
    overlaps_experts: bool = True


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


def memory_of(config: RunConfig, layout: Layout, assumptions: Assumptions) -> Memory:
    """Peak memory of the fullest rank of a run that is one training stage."""
    storage = storage_of(config)
    return estimate_memory(config, layout, storage, margin=assumptions.margin, imbalance=assumptions.imbalance)


def estimate(config: RunConfig, layout: Layout, hardware: Hardware, assumptions: Assumptions) -> Estimate:
    """Memory and time of one layout; the configuration is a run without stages."""
    storage = storage_of(config)
    memory = memory_of(config, layout, assumptions)
    step = estimate_step(
        config,
        layout,
        hardware,
        storage,
        overlap=assumptions.overlap,
        imbalance=assumptions.imbalance,
        sent_rows=assumptions.sent_rows,
        overlaps_experts=assumptions.overlaps_experts,
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
            "hidden_seconds": step.hidden,
            "beside_experts_seconds": step.beside_experts,
            "exposed_gather_seconds": step.exposed_gathers,
        },
    }
