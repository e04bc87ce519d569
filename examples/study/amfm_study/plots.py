"""Plots of a study: each measure against the share of attention, one line a mixer.

One PNG for the whole study, so that tasks, speed and state size of a ratio stand above each other. Drawn to a
temporary file and renamed, as a study that is interrupted must not leave half a picture.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from amfm.data_pipeline.durable.files import replacing
from amfm.pretrain.report.numbers import short
from amfm_study.grid import ONLY_ATTENTION
from amfm_study.table import ACCURACY, Measure, Row, show_ratio

# Told apart by people who do not see all colours (Wong 2011, Nature Methods 8, 441), and by marker.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#000000")
MARKERS = "osv^DPX*"
STYLE = {
    "font.size": 9,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
}
Point = tuple[float, float, float]  # value, lowest, highest


def draw_study(rows: Sequence[Row], measures: Mapping[str, Measure], state_tokens: int, path: Path) -> None:
    """Write one PNG: a panel a task, tokens per second on the first task, and the size of a decode state.

    Ratios are spaced evenly in the order of their attention share.
    """
    first = next(iter(measures))
    panels: list[tuple[str, str, Callable[[Row], Point | None]]] = [
        (f"{task}: {measure.name}", measure.unit, value_of(task)) for task, measure in measures.items()
    ]
    values = [point for _, _, point in panels]
    panels.append((f"{first}: throughput", "tokens / s", speed_of(first)))
    panels.append((f"Decode state after {state_tokens:,} tokens", "per sequence", size_of))
    ratios = sorted({row.ratio: row.attention_share for row in rows}.items(), key=lambda pair: pair[1])
    places = {ratio: place for place, (ratio, _) in enumerate(ratios)}
    with matplotlib.rc_context(STYLE):
        columns = 3 if len(panels) == 3 else 2
        lines = -(-len(panels) // columns)
        canvas = Figure(figsize=(5.2 * columns, 3.4 * lines + 0.4), layout="constrained")
        axes = list(canvas.subplots(lines, columns, squeeze=False).flat)
        for (title, unit, point), panel in zip(panels, axes):
            draw_panel(panel, rows, places, point)
            panel.set_title(title)
            panel.set_ylabel(unit)
            panel.set_xticks(list(places.values()), [show_ratio(ratio).replace(" ", "\n") for ratio in places])
            # Accuracies share the axis from 0 to 1, so that panels of tasks can be compared; state sizes differ by
            # orders of magnitude.
            if unit == ACCURACY.unit:
                panel.set_ylim(0, 1.03)
            elif point is size_of:
                panel.set_yscale("log")
                panel.yaxis.set_major_locator(LogLocator(base=4))
                panel.yaxis.set_major_formatter(FuncFormatter(show_bytes))
                panel.yaxis.set_minor_locator(NullLocator())
            elif point not in values:
                panel.set_ylim(0, 1.08 * panel.dataLim.ymax)
                panel.yaxis.set_major_formatter(FuncFormatter(short))
        for panel in axes[len(panels) :]:
            panel.set_axis_off()
        for panel in axes[max(0, len(panels) - columns) : len(panels)]:
            panel.set_xlabel("linear mixers : attention")
        # One legend for the figure: mixers have the same colour and marker in every panel.
        handles, labels = axes[0].get_legend_handles_labels()
        canvas.legend(handles, labels, loc="outside upper center", ncols=min(6, len(labels)))
        # Without the software's name in it, equal results give equal files.
        with replacing(path) as file:
            canvas.savefig(file, format="png", dpi=130, metadata={"Software": None})


def draw_panel(axes: Any, rows: Sequence[Row], places: Mapping[str, int], point: Callable[[Row], Point | None]) -> None:
    """Draw one line per mixer over the ratios, with error bars from the lowest to the highest seed.

    Two ratios are two markers: a line between them would look like a trend.
    """
    mixers = list(dict.fromkeys(row.mixer for row in rows))
    for index, mixer in enumerate(mixers):
        is_attention = all(row.ratio == ONLY_ATTENTION for row in rows if row.mixer == mixer)
        beside = (
            0.0 if is_attention else 0.05 * (index - (len(mixers) - 1) / 2)
        )  # bars of several do not hide each other
        found = [(places[row.ratio], point(row)) for row in rows if row.mixer == mixer]
        measured = sorted((place, value) for place, value in found if value is not None)
        if not measured:
            continue
        values = [value for _, (value, _, _) in measured]
        below = [value - low for _, (value, low, _) in measured]
        above = [high - value for _, (value, _, high) in measured]
        axes.errorbar(
            [place + beside for place, _ in measured],
            values,
            yerr=[below, above],
            label=mixer,
            color="#000000" if is_attention else COLOURS[index % len(COLOURS)],
            marker="D" if is_attention else MARKERS[index % len(MARKERS)],
            markersize=5,
            linewidth=1.4,
            linestyle="-" if len(measured) > 2 else "none",
            capsize=2.5,
        )


def value_of(task: str) -> Callable[[Row], Point | None]:
    """Function of a row: (mean, lowest, highest) of a task's measure, None where it is not measured."""

    def point(row: Row) -> Point | None:
        found = row.tasks.get(task)
        return (found.mean, found.low, found.high) if found else None

    return point


def speed_of(task: str) -> Callable[[Row], Point | None]:
    """Function of a row: tokens per second of training a task, None where it is not measured."""

    def point(row: Row) -> Point | None:
        found = row.tasks.get(task)
        return (found.tokens_per_second,) * 3 if found else None

    return point


def size_of(row: Row) -> Point:
    """Bytes of a row's decode state."""
    return (float(row.state_bytes),) * 3


def show_bytes(value: float, _position: int | None = None) -> str:
    """Format a size in the unit in which it is a small number: 4194304 -> 4 MiB."""
    for power, unit in ((3, "GiB"), (2, "MiB"), (1, "KiB")):
        if value >= 1024**power:
            return f"{value / 1024**power:.3g} {unit}"
    return f"{value:.0f} bytes"
