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
from amfm_study.crossed import name_value
from amfm_study.equal import flops_of_run, tokens_per_step
from amfm_study.grid import ONLY_ATTENTION, Cell
from amfm_study.settings_table import SettingRow
from amfm_study.table import ACCURACY, Measure, Row, TaskSummary, read_record, show_ratio

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
MOST_IN_LEGEND = 10
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


def draw_settings(
    rows: Sequence[SettingRow], measures: Mapping[str, Measure], cells: Sequence[Cell], path: Path
) -> None:
    """Write one PNG, for each task: the measure by setting or along the longest axis of a grid, and loss against FLOPs."""
    with matplotlib.rc_context(STYLE):
        canvas = Figure(figsize=(10.5, 0.5 + 3.6 * len(measures)), layout="constrained")
        panels = canvas.subplots(len(measures), 2, squeeze=False)
        for (left, right), (task, measure) in zip(panels, measures.items()):
            own = [row for row in rows if row.task == task]
            axis = longest_axis(own)
            if axis is None:
                draw_labels(left, own)
            else:
                draw_axis(left, own, axis, lower_is_better=measure is not ACCURACY)
            draw_curves(right, [cell for cell in cells if cell.task == task], axis)
            left.set_title(f"{task}: {measure.name}", loc="left")
            right.set_title(f"{task}: training loss", loc="left")
            (left.set_xlabel if axis is None else left.set_ylabel)(measure.unit)
        with replacing(path) as file:
            canvas.savefig(file, format="png", dpi=130, metadata={"Software": None})


def longest_axis(rows: Sequence[SettingRow]) -> str | None:
    """The axis of numbers with the most values; None without one of three."""
    values: dict[str, set[float]] = {}
    for row in rows:
        for key, value in row.values.items():
            if type(value) in (int, float):
                values.setdefault(key, set()).add(value)
    best = max(values, key=lambda key: len(values[key]), default=None)
    return best if best is not None and len(values[best]) > 2 else None


def draw_labels(axes: Any, rows: Sequence[SettingRow]) -> None:
    """A line for each setting: its mean and, of several seeds, the lowest and the highest; the first one's mean is dotted."""
    found = [(row.label, row.summary) for row in rows if row.summary is not None]
    for place, (_, summary) in enumerate(found):
        spread = [[summary.mean - summary.low], [summary.high - summary.mean]]
        axes.errorbar([summary.mean], [place], xerr=spread, color=COLOURS[0], marker="o", markersize=5, capsize=2.5)
    if found:
        axes.axvline(found[0][1].mean, color="#7f7f7f", linewidth=1, linestyle=":")
    axes.set_yticks(range(len(found)), [label for label, _ in found])
    axes.set_ylim(len(found) - 0.5, -0.5)


def line_of(label: str, values: Mapping[str, Any], axis: str | None) -> str:
    """The line that a setting is on: its label without its value on the axis."""
    if axis is None:
        return label
    return label.replace(name_value(axis, values[axis]), "").strip("-").replace("--", "-")


def draw_axis(axes: Any, rows: Sequence[SettingRow], axis: str, *, lower_is_better: bool) -> None:
    """One line for each combination of the other axes, over the values of this one; the best point is filled."""
    lines: dict[str, list[tuple[float, TaskSummary]]] = {}
    for row in rows:
        points = lines.setdefault(line_of(row.label, row.values, axis), [])
        if row.summary is not None:
            points.append((row.values[axis], row.summary))
    for number, (label, points) in enumerate(lines.items()):
        if not points:
            continue
        points.sort(key=lambda point: point[0])
        means = [summary.mean for _, summary in points]
        spread = [[s.mean - s.low for _, s in points], [s.high - s.mean for _, s in points]]
        style = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)], "markersize": 6}
        values = [value for value, _ in points]
        axes.errorbar(values, means, yerr=spread, label=label, capsize=2.5, markerfacecolor="white", **style)
        best = means.index(min(means) if lower_is_better else max(means))
        axes.plot([values[best]], [means[best]], zorder=5, **style)
    values = sorted({row.values[axis] for row in rows})
    if values[0] > 0 and values[-1] >= 4 * values[0]:
        axes.set_xscale("log", base=2)
        axes.set_xticks(values, [f"{value:g}" for value in values])
        axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(axis)
    if any(lines):
        axes.legend(fontsize=8)


def draw_curves(axes: Any, cells: Sequence[Cell], axis: str | None) -> None:
    """Training loss of each setting's first seed over the FLOPs spent, also of those that ended early.

    Colours are those of the lines along the axis; a lighter one is of a lower value on it.
    """
    own = [cell for cell in cells if cell.seed == cells[0].seed]
    lines = list(dict.fromkeys(line_of(cell.mixer, dict(cell.values), axis) for cell in own))
    places = [] if axis is None else sorted({dict(cell.values)[axis] for cell in own})
    for cell in own:
        record, values = read_record(cell), dict(cell.values)
        if record is None:
            continue
        steps, losses = record.series("loss")
        flops = flops_of_run(cell.config, tokens_per_step(cell.config))
        window = max(1, len(losses) // 40)
        smooth = [sum(losses[max(0, at - window + 1) : at + 1]) / min(window, at + 1) for at in range(len(losses))]
        line = line_of(cell.mixer, values, axis)
        place = 1.0 if axis is None else (places.index(values[axis]) + 1) / len(places)
        axes.plot(
            [step * flops for step in steps],
            smooth,
            label=line if place == 1 else None,
            color=COLOURS[lines.index(line) % len(COLOURS)],
            alpha=0.2 + 0.8 * place,
            linewidth=1.3,
        )
    axes.set_xlabel("training FLOPs")
    axes.xaxis.set_major_formatter(FuncFormatter(short))
    axes.set_ylabel("nats per token")
    if any(lines) and len(lines) <= MOST_IN_LEGEND:
        axes.legend(fontsize=8, title=None if axis is None else f"lighter: lower {axis.rpartition('.')[2]}")
