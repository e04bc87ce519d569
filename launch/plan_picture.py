"""A picture of a plan: the bytes of the fullest rank by part, one bar a ZeRO stage, against the device's memory."""

from __future__ import annotations

from pathlib import Path

from launch.plan import ZERO_STAGES, Assumptions, Plan, estimate
from launch.plan_hardware import GIB
from launch.plan_memory import Layout

FORMATS = (".png", ".svg", ".pdf")


def check_picture(path: Path) -> None:
    """Refuse, before any work, a file that cannot be written. Raises ValueError."""
    if path.suffix not in FORMATS:
        raise ValueError(f"--picture {path} must end in one of {', '.join(FORMATS)}; use {path.stem or 'plan'}.png")
    if not path.parent.is_dir():
        raise ValueError(f"--picture {path}: {path.parent} is no folder; make it, or name another place")


def draw_memory(plan: Plan, assumptions: Assumptions, path: Path) -> None:
    """Write the picture; its format follows the file's name."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    own = plan.own.layout
    layouts = [Layout(own.ranks, stage, own.micro_batch_size) for stage in ZERO_STAGES]
    memories = [estimate(plan.config, layout, plan.hardware, assumptions).memory for layout in layouts]
    names = list(dict.fromkeys(name for memory in memories for name in memory.parts))
    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    bases = [0.0] * len(memories)
    labels = [f"ZeRO-{layout.zero_stage}" + (" (yours)" if layout == own else "") for layout in layouts]
    for name in names:
        heights = [memory.parts.get(name, 0.0) / GIB for memory in memories]
        axes.bar(labels, heights, bottom=bases, label=name)
        bases = [base + height for base, height in zip(bases, heights)]
    axes.axhline(plan.hardware.memory_gib, color="black", linestyle="--", label=f"{plan.hardware.name}")
    axes.set_ylim(0, 1.05 * max(*bases, plan.hardware.memory_gib))
    axes.set_ylabel("GiB on the fullest rank")
    rows = f"{own.micro_batch_size} row{'s' if own.micro_batch_size > 1 else ''} of {plan.config.train.sequence_length}"
    axes.set_title(f"{plan.counts.total / 1e9:,.2f}B parameters, {own.ranks} ranks, {rows} a pass")
    axes.legend(bbox_to_anchor=(1.0, 1.0), loc="upper left")
    figure.savefig(path)
