"""Layouts ranked: those that fit by their speed, the nearest misses with a reason, and one layout for each training stage.

4K rows and 256K rows want other axes, other recomputation and other micro-batches, and most tokens are in short rows. So
a search ranks the layouts of each stage on its own. Ranks that restart take minutes, so a stage stays in the layout of
the stage before it unless a faster one gains more than that over the whole stage.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from amfm.launch.plan.estimate import Assumptions, Estimate, estimate, explain_misfit, memory_of
from amfm.launch.plan.hardware import GIB, Hardware
from amfm.launch.plan.layout import Layout
from amfm.launch.plan.left_out import LeftOut, Tally
from amfm.launch.plan.memory import Memory
from amfm.launch.plan.search import is_allowed, recomputed, with_layout
from amfm.pretrain.checks.stages import declaring_stage
from amfm.pretrain.config.schema import RunConfig
from amfm.pretrain.recompute import recomputed_letters
from amfm.pretrain.stages import RunStage

NEAR_MISSES = 3
KEPT_PARTS = ("weights", "master weights", "moments", "gradients")  # that no recomputation spares
LEAST_WAITING = 0.01  # of a step for experts' rows, below which halves are not tried; for the host, room for rows
ROOM = 1.5  # even shares of places for rows, where the host must not count them
RESTART_SECONDS = 600.0  # of saving, starting all ranks and loading, where the layout changes


@dataclass(frozen=True)
class Found:
    """Layouts that fit, fastest first, the nearest misses, and after a search why the others are left out."""

    fitting: tuple[Estimate, ...]
    misses: tuple[Estimate, ...]
    left_out: tuple[LeftOut, ...] = ()

    @property
    def nearest(self) -> Estimate | None:
        """The fastest that fits, else the nearest miss; None if nothing obeys the rules."""
        return next(iter((*self.fitting, *self.misses)), None)


def rank_layouts(
    config: RunConfig,
    runs: list[RunConfig],
    layouts: Iterable[Layout],
    hardware: Hardware,
    assumptions: Assumptions,
    *,
    recomputes: bool,
    tally: Tally | None = None,
) -> Found:
    """Layouts that suit and fit every training stage, fastest in the first stage first; and the nearest misses.

    `recomputes`: a layout that does not fit is tried again with more blocks recomputed, and one that fits with spread experts
    in halves, and with room for its rows, too. `tally`: counts what does not fit.
    """
    fitting: list[Estimate] = []
    misses: list[tuple[Layout, Memory, str]] = []
    room = hardware.memory_gib * GIB
    for layout in layouts:
        options = recomputed(runs[0], layout) if recomputes else iter((layout,))
        option, memory, reason = least_recomputed(config, runs, options, hardware, assumptions)
        if reason:
            misses.append((option, memory, reason))
            if tally is not None:
                tally.overflow(option, memory, reason)
        else:
            found = estimate(runs[0], option, hardware, assumptions, memory)
            for change in faster_choices(found, runs[0]) if recomputes else ():
                option = replace(found.layout, **change)
                other = estimate(runs[0], option, hardware, assumptions, found.memory)
                if other.step.total() < found.step.total():
                    memory, reason = memory_of_stages(config, runs, option, hardware, assumptions)
                    found = found if reason else replace(other, memory=memory)
            fitting.append(found)
    fitting.sort(key=lambda item: item.step.total())
    misses.sort(key=lambda miss: (miss[1].total() <= room, miss[1].total()))  # broken rules last
    nearest = [
        replace(estimate(runs[0], layout, hardware, assumptions), memory=memory, reason=reason)
        for layout, memory, reason in misses[:NEAR_MISSES]
    ]
    return Found(tuple(fitting), tuple(nearest))


def least_recomputed(
    config: RunConfig, runs: list[RunConfig], options: Iterator[Layout], hardware: Hardware, assumptions: Assumptions
) -> tuple[Layout, Memory, str]:
    """The first of options with ever more recomputation that fits, with its memory; else the last one and why it does not."""
    first = next(options)
    memory, reason = memory_of_stages(config, runs, first, hardware, assumptions)
    if not reason or sum(memory.parts.get(name, 0.0) for name in KEPT_PARTS) > hardware.memory_gib * GIB:
        return first, memory, reason  # what no recomputation frees is already too much
    *between, last = [first, *options]
    # Where everything computed again does not fit, which most layouts find, nothing between does.
    found = last, *memory_of_stages(config, runs, last, hardware, assumptions)
    if found[2]:
        return found
    for option in between[1:]:
        memory, reason = memory_of_stages(config, runs, option, hardware, assumptions)
        if not reason:
            return option, memory, reason
    return found


def faster_choices(found: Estimate, config: RunConfig) -> Iterator[dict[str, Any]]:
    """What may make a layout faster, and no other axis depends on: of spread experts more, of several pieces per rank another cut.

    Halves, of experts' rows or two-batch overlap, save at most the waiting time, and a buffer for rows the waits of the host
    that counts them.
    """
    total = found.step.total()
    if found.step.communication.get("expert", 0.0) > LEAST_WAITING * total:
        yield {"overlap_experts": True}
        if is_allowed(with_layout(config, replace(found.layout, overlap_experts="two_batch")), found.layout.ranks):
            yield {"overlap_experts": "two_batch"}
    moe = config.model.moe
    is_counted = found.layout.expert > 1 and moe is not None and moe.capacity_factor is None
    if is_counted and found.step.host > LEAST_WAITING * total:
        yield {"expert_buffer_factor": ROOM}
    if found.layout.virtual_stages > 1:
        yield {"balance": "ranks"}


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
        memory = memory_of(run, here, assumptions, hardware)
        reason = explain_misfit(memory, hardware)
        if reason:
            return memory, stage + reason
        found = found or (memory, "")
    assert found is not None, "a run has a stage"
    return found


def choose_layouts(stages: Sequence[RunStage], found: Sequence[Found]) -> tuple[Estimate | None, ...]:
    """Choose a layout for each stage: the fastest, or that of the stage before where a new start would gain nothing."""
    chosen: list[Estimate | None] = []
    for stage, here in zip(stages, found):
        best, before = here.nearest, chosen[-1] if chosen else None
        if best is not None and before is not None:
            present = before.layout.settings()
            staying = next((item for item in here.fitting if item.layout.settings() == present), None)
            if staying is not None:
                gain = (staying.step.total() - best.step.total()) * stage.num_steps
                best = staying if gain < RESTART_SECONDS else best
        chosen.append(best)
    return tuple(chosen)


def at_stage(layout: Layout, config: RunConfig, index: int, run: RunConfig) -> Layout:
    """The first stage's layout as it is in a later stage, which may declare another, micro-batches or recomputation."""
    # A value of stage 0 is already in the first layout, so only later stages count.
    if declaring_stage(config, index, "parallel"):
        return Layout.of(run, layout.ranks)
    micro_rows = (
        run.train.micro_batch_size if declaring_stage(config, index, "micro_batch_size") else layout.micro_batch_size
    )
    declared = [declaring_stage(config, index, name) for name in ("recompute", "recompute_blocks")]
    letters = recomputed_letters(run) if any(declared) else layout.recompute
    return replace(layout, micro_batch_size=micro_rows, recompute=letters)
