"""Chart of traced ranks: memory over the operations of a step, coloured by phase, and the streams of its timeline."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from amfm.launch.plan.hardware import GIB
from amfm.launch.simulate.timeline import COMPUTE, HOST, Timeline
from amfm.launch.simulate.trace import TracedRank

COLOURS = {"forward": "C0", "backward": "C1", "reduction": "C2", "optimizer": "C3"}


def draw_trace(ranks: Sequence[TracedRank], timelines: Sequence[Timeline], path: Path) -> None:
    """Write the chart to `path`: a panel per rank, and one per timeline; the suffix chooses the format."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = len(ranks) + len(timelines)
    figure = Figure(figsize=(11, 3.5 * panels), layout="constrained")
    FigureCanvasAgg(figure)
    column = figure.subplots(panels, 1, squeeze=False)[:, 0]
    for axes, entry in zip(column, ranks):
        draw_memory_curve(axes, entry)
    for axes, line in zip(column[len(ranks) :], timelines):
        draw_streams(axes, line)
    figure.savefig(path)


def draw_streams(axes: Any, line: Timeline) -> None:
    """Draw what each stream of a rank does over the milliseconds of the step: computing by kind of block, exchanges by axis."""
    bars: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
    for piece in line.slices:
        if piece.lane != HOST:
            what = piece.name.partition(":")[0] if piece.lane == COMPUTE else "exchanges"
            bars[piece.lane, what].append((1e3 * piece.start, 1e3 * (piece.stop - piece.start)))
    lanes = [COMPUTE, *sorted({lane for lane, _ in bars} - {COMPUTE})]
    kinds = dict.fromkeys(what for _, what in bars)
    colours = {what: f"C{number}" for number, what in enumerate(kinds)}
    for (lane, what), spans in bars.items():
        axes.broken_barh(spans, (lanes.index(lane) - 0.4, 0.8), facecolors=colours[what], rasterized=True)
    for what, colour in colours.items():
        axes.bar(0, 0, color=colour, label=what)
    axes.set_yticks(range(len(lanes)), lanes)
    axes.invert_yaxis()
    axes.set_xlim(0, 1e3 * line.seconds)
    axes.set_xlabel("ms of the step, without host and launches")
    axes.set_title(f"streams of rank {line.entry.rank}", loc="left")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)


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
