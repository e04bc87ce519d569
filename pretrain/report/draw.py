"""Draws plots with matplotlib: for pictures, and as inline SVG for readers whose browser runs no script.

For the page, a plot is drawn in placeholder colours that occur nowhere else; `themed` replaces them with variables of the
style sheet, so that one SVG serves light and dark. Text stays text (`svg.fonttype: none`): it is small, can be searched
and takes the page's font. Long curves are thinned to MAX_POINTS points, noisy
ones are smoothed above their envelope.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import Formatter, LogLocator, MaxNLocator, NullFormatter

from amfm.pretrain.report.curves import Curve, HeatMap, Plot
from amfm.pretrain.report.numbers import THEMED, Colours, distinct, keep_extremes, make_columns, short, smooth

MAX_POINTS = 400
MAX_ENVELOPE = 200  # columns of an envelope, so that neighbours of steps of one value each show as an area
MARK_PLACES = 60
MARKS: dict[str, tuple[str, int | None]] = {"other": ("|", None), "trouble": ("D", 3), "failure": ("^", 1)}
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)))


class TickLabels(Formatter):
    """Labels in three digits, or as many as tell them apart."""

    def __call__(self, value: float, position: int | None = None) -> str:
        """One label on its own."""
        return short(value)

    def format_ticks(self, values: Sequence[float]) -> list[str]:
        """All labels of an axis."""
        return distinct(values)


def draw_plot(plot: Plot, axes: Any, colours: Colours) -> None:
    """Draw a plot on a pair of axes; the horizontal one is steps, in integers."""
    if plot.heat is not None:
        draw_heat(plot.heat, plot.unit, axes)
    else:
        for stage in plot.stages[1::2]:
            axes.axvspan(stage.first, stage.last, color=colours.ink, alpha=0.08, linewidth=0)
        draw_marks(plot, axes, colours)
        for curve in plot.curves:
            draw_curve(curve, axes, colours)
        shape_values(plot, axes, colours)
        if sum(bool(curve.name) for curve in plot.curves) > 1:
            axes.legend(loc="best")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    axes.xaxis.set_major_formatter(TickLabels())
    axes.set_xlabel("step")


def draw_marks(plot: Plot, axes: Any, colours: Colours) -> None:
    """Draw what happened at the foot of a plot, where it is no more than one of MARK_PLACES places wide."""
    for kind, (marker, series) in MARKS.items():
        steps = [mark.step for mark in plot.marks if mark.kind == kind]
        if not steps:
            continue  # of a line without points matplotlib's layout believes that it reaches the figure's corner
        width = max(1, (max(steps) - min(steps)) // MARK_PLACES)
        places = [step * width for step in sorted({step // width for step in steps})]
        colour = colours.ink if series is None else colours.series[series]
        style = {"marker": marker, "markersize": 4, "linestyle": "", "clip_on": False, "label": "_hidden"}
        axes.plot(places, [0.0] * len(places), color=colour, transform=axes.get_xaxis_transform(), **style)


def draw_curve(curve: Curve, axes: Any, colours: Colours) -> None:
    """Draw one curve, thinned; a single point gets a marker, since a line would not show."""
    colour, values = colours.series[curve.series], curve.values
    if curve.noisy and curve.has_envelope:
        columns = make_columns(curve.steps, values, MAX_ENVELOPE)
        axes.fill_between(columns.steps, columns.lows, columns.highs, color=colour, alpha=0.25, linewidth=0.4)
    steps, shown = keep_extremes(curve.steps, smooth(values) if curve.noisy else values, MAX_POINTS)
    axes.plot(
        steps,
        shown,
        color=colour,
        linestyle=DASHES[curve.dash],
        marker="o" if curve.dots or len(steps) == 1 else "",
        markersize=3 if len(steps) > 1 else 4,
        label=curve.name or "_hidden",
        linewidth=1.5,
    )


def shape_values(plot: Plot, axes: Any, colours: Colours) -> None:
    """Shape the vertical axis: its ends, its scale with more than one tick, the dashed limit, the unit."""
    if plot.is_log:
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        # Within one decade a locator of powers finds one tick or none.
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)) if high / low > 20 else MaxNLocator(5))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(TickLabels())
    if plot.usual is not None:
        axes.set_ylim(*plot.usual)
        axes.set_title("begin and spikes are outside", fontsize=7, loc="right", color=colours.ink)
    if plot.lowest is not None:
        axes.set_ylim(bottom=plot.lowest)
    if plot.highest is not None:
        axes.set_ylim(top=plot.highest)
    if plot.limit is not None:
        axes.axhline(plot.limit, color=colours.ink, linewidth=0.8, linestyle=(0, (4, 3)))
    axes.set_ylabel(plot.unit)


def draw_heat(heat: HeatMap, unit: str, axes: Any) -> None:
    """Draw a map as cells of colour between the ends of its scale, with a bar that shows which colour is how much."""
    grid = np.array([[np.nan if value is None else value for value in row] for row in heat.rows])
    extent = (heat.edges[0], heat.edges[-1], len(grid) - 0.5, -0.5)
    norm = (LogNorm if heat.is_log else Normalize)(heat.lowest, heat.highest, clip=True)
    image = axes.imshow(grid, aspect="auto", interpolation="nearest", cmap="viridis", norm=norm, extent=extent)
    axes.grid(visible=False)
    shown = range(0, len(heat.names), max(1, len(heat.names) // 10))
    axes.set_yticks(list(shown), [heat.names[index] for index in shown])
    bar = axes.figure.colorbar(image, ax=axes, pad=0.02, aspect=16)
    bar.outline.set_visible(False)
    bar.set_label(unit)
    bar.ax.yaxis.set_major_locator(MaxNLocator(4))
    bar.ax.yaxis.set_major_formatter(TickLabels())
    bar.ax.yaxis.set_minor_formatter(NullFormatter())


def draw_svg(plot: Plot) -> str:
    """Draw a plot as an SVG element, in the page's variables for colours and with ids that are unique on the page."""
    with matplotlib.rc_context({**style(THEMED), "svg.hashsalt": plot.name}):
        canvas = Figure(figsize=(4.5, 2.6), layout="constrained")
        draw_plot(plot, canvas.subplots(), THEMED)
        buffer = io.StringIO()
        canvas.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return themed(buffer.getvalue(), plot.name)


def style(colours: Colours) -> dict[str, Any]:
    """Build matplotlib's settings (rcParams) of a figure in these colours."""
    ink = dict.fromkeys(("axes.labelcolor", "xtick.color", "ytick.color", "text.color"), colours.ink)
    no_ticks = dict.fromkeys(("xtick.major.size", "ytick.major.size", "xtick.minor.size", "ytick.minor.size"), 0)
    return {
        **ink,
        **no_ticks,
        "svg.fonttype": "none",
        "font.size": 8.8,
        "font.family": "sans-serif",
        "axes.edgecolor": colours.line,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "grid.color": colours.line,
        "grid.linewidth": 0.6,
        "legend.frameon": False,
        "lines.linewidth": 1.4,
        "lines.solid_capstyle": "round",
    }


def themed(document: str, name: str) -> str:
    """Extract the <svg> element of a matplotlib document and fit it to the page: its colours, own ids, no fixed size.

    Ids get the plot's name in front, because several figures share one page, and so do the references to them.
    """
    svg = document[document.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(url\(|href=")#', rf"\1#{name}-", svg)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r"font: ([0-9.]+)px [^;\"]*", r"font-size: \1px", svg)
    for name_of_colour, colour in THEMED.named():
        svg = svg.replace(colour, f"var(--{name_of_colour})")
    return svg
