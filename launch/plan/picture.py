"""Chart of a plan: memory of the fullest rank by part for each ZeRO stage, and the timeline of a step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from launch.plan.estimate import Assumptions, estimate
from launch.plan.hardware import GIB
from launch.plan.plan import Plan
from launch.plan.search import ZERO_STAGES, is_allowed, with_layout
from pretrain.checks.stages import run_of_stage


def draw_plan(plan: Plan, assumptions: Assumptions, path: Path) -> None:
    """Write the chart to `path`; the suffix chooses the format."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 8), layout="constrained")
    FigureCanvasAgg(figure)
    memory_axes, time_axes = figure.subplots(2, 1, height_ratios=(3, 2))
    draw_memory(memory_axes, plan, assumptions)
    draw_timeline(time_axes, plan)
    figure.savefig(path)


def draw_memory(axes: Any, plan: Plan, assumptions: Assumptions) -> None:
    """Draw memory by part, GiB, for every ZeRO stage that the other axes allow, against the device's memory."""
    own, config = plan.own.layout, run_of_stage(plan.config, plan.stages[0].stage)
    layouts = [replace(own, zero_stage=stage) for stage in ZERO_STAGES]
    layouts = [layout for layout in layouts if is_allowed(with_layout(config, layout), own.ranks)]
    memories = [estimate(config, layout, plan.hardware, assumptions).memory for layout in layouts]
    names = list(dict.fromkeys(name for memory in memories for name in memory.parts))
    bases = [0.0] * len(memories)
    labels = [f"ZeRO-{layout.zero_stage}" + (" (yours)" if layout == own else "") for layout in layouts]
    for name in names:
        heights = [memory.parts.get(name, 0.0) / GIB for memory in memories]
        axes.bar(labels, heights, bottom=bases, label=name, width=0.6)
        bases = [base + height for base, height in zip(bases, heights)]
    axes.axhline(plan.hardware.memory_gib, color="black", linestyle="--", label=f"{plan.hardware.name}")
    axes.set_ylim(0, 1.05 * max(*bases, plan.hardware.memory_gib))
    axes.set_ylabel("GiB on the fullest rank")
    rows = f"{own.micro_batch_size} row{'s' if own.micro_batch_size > 1 else ''} of {config.train.sequence_length}"
    axes.set_title(f"{plan.counts.total / 1e9:,.2f}B parameters, {own.ranks} ranks, {rows} a pass\n{own.describe()}")
    axes.legend(bbox_to_anchor=(1.0, 1.0), loc="upper left")


def draw_timeline(axes: Any, plan: Plan) -> None:
    """Draw the step of the slowest rank from left to right: compute above, communication below.

    Inside the passes blocks and their collectives alternate; here parts of one kind are drawn together.
    """
    step = plan.own.step
    spans: list[tuple[str, float, float, int]] = []
    at = 0.0
    for row, parts in ((1, step.compute), (0, step.communication)):
        for name, seconds in parts.items():
            spans.append((name if row else f"{name} exchange", at, seconds, row))
            at += seconds
    rest = [
        ("gathers of weights", step.exposed_gathers, 0),
        ("bubble", step.bubble, 1),
        ("reduction", step.reduction, 0),
        ("optimizer and sums of gradients", step.optimizer, 1),
    ]
    for name, seconds, row in rest:
        spans.append((name, at, seconds, row))
        at += seconds
    for index, (name, start, seconds, row) in enumerate(spans):
        if seconds > 0:
            axes.barh(
                row,
                seconds,
                left=start,
                color=f"C{index % 10}",
                label=f"{name}, {seconds:,.3g} s",
                hatch="//" * (row == 0),
            )
    axes.set_yticks([0, 1], ["communication", "compute"])
    axes.set_xlim(0, at)
    axes.set_xlabel("seconds of a step")
    axes.set_title(f"{at:,.3g} s a step, MFU {plan.own.mfu:.1%}")
    axes.legend(bbox_to_anchor=(1.0, 1.0), loc="upper left")
