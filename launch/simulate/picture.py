"""Chart of traced ranks: memory over the operations of a step, coloured by phase."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from amfm.launch.plan.hardware import GIB
from amfm.launch.simulate.trace import TracedRank

COLOURS = {"forward": "C0", "backward": "C1", "reduction": "C2", "optimizer": "C3"}


def draw_trace(ranks: Sequence[TracedRank], path: Path) -> None:
    """Write the chart to `path`, one panel a rank; the suffix chooses the format."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.5 * len(ranks)), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, entry in zip(figure.subplots(len(ranks), 1, squeeze=False)[:, 0], ranks):
        draw_memory_curve(axes, entry)
    figure.savefig(path)


def draw_memory_curve(axes: Any, entry: TracedRank) -> None:
    """Draw bytes held after each larger allocation of the second step, in GiB, and the planned peak."""
    curve = entry.traced["curve"]
    first = curve[0][0]
    places, sizes = [point[0] - first for point in curve], [point[1] / GIB for point in curve]
    axes.plot(places, sizes, color="black", linewidth=0.6)
    for phase, colour in COLOURS.items():
        inside = [point[2] == phase for point in curve]
        axes.fill_between(places, sizes, where=inside, step="post", color=colour, alpha=0.5, label=phase)
    peak = entry.predicted.total() / GIB
    axes.axhline(peak, color="black", linestyle="--", label=f"planned peak, {peak:,.2f} GiB")
    axes.set_ylim(bottom=0)
    axes.set_ylabel("GiB")
    axes.set_xlabel("operations of the step")
    axes.set_title(f"rank {entry.rank}, {entry.layout.describe()}: traced peak {entry.peak_bytes / GIB:,.2f} GiB")
    axes.legend(bbox_to_anchor=(1.0, 1.0), loc="upper left")
