"""Several runs on one page: their curves over each other, what they reached, and the settings in which they differ.

A run keeps its colour and dashes in every plot and in the table that is the page's legend. Curves of one measure are one
plot, and noisy ones are smoothed over about a hundredth of each run, so that it shows differences between runs rather
than noise between batches.

One picture of a run for a page or a talk: loss, balance of experts, speed and gradients, with the run's size above. The plots
are those of the report, drawn in its light colours on one canvas of up to two by two panels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from amfm.data_pipeline.durable.files import replacing
from amfm.pretrain.config.file import Difference, diff_configs
from amfm.pretrain.monitor.follow import FollowedRun
from amfm.pretrain.report.curves import NUM_COLOURS, NUM_DASHES, Curve, Plot, cap_outliers, curve_style, usual_range
from amfm.pretrain.report.data import RunRecord
from amfm.pretrain.report.draw import draw_plot, style
from amfm.pretrain.report.numbers import LIGHT, count, plain, short, smooth
from amfm.pretrain.report.page import Table
from amfm.pretrain.report.plots import make_plots
from amfm.pretrain.report.verdict import describe_state, judge_run

MAX_RUNS = NUM_COLOURS * NUM_DASHES
Series = tuple[Sequence[int], Sequence[float]]


@dataclass(frozen=True)
class Measure:
    """A measure by which runs are compared: how it is called and drawn, and how to read it from a run.

    `is_rare`: measured now and then, so that each value is marked. `is_exact`: free of noise. Only others are smoothed.
    """

    name: str
    title: str
    caption: str
    unit: str
    read: Callable[[RunRecord], Series]
    is_log: bool = False
    lowest: float | None = None
    is_rare: bool = False
    is_exact: bool = False


def read_key(key: str, factor: float = 1.0) -> Callable[[RunRecord], Series]:
    """Make a function of a run that reads one metric, times a factor."""

    def read(record: RunRecord) -> Series:
        steps, values = record.series(key)
        return steps, [factor * value for value in values]

    return read


def read_fullest(record: RunRecord) -> Series:
    """Read the expert load of whichever MoE block is worst balanced, at each step."""
    worst: dict[int, float] = {}
    for steps, loads in record.named_series("expert_load").values():
        for step, load in zip(steps, loads):
            worst[step] = max(load, worst.get(step, 0.0))
    return sorted(worst), [worst[step] for step in sorted(worst)]


MEASURES = (
    Measure("loss", "Training loss", "Smoothed.", "nats per token", read_key("loss")),
    Measure("validation", "Validation loss", "", "nats per token", read_key("validation_loss"), is_rare=True),
    Measure("bits", "Validation, bits per byte", "Comparable even if tokenizers differ.", "bits per byte", read_key("validation_bits_per_byte"), is_rare=True),
    Measure("accuracy", "Validation accuracy", "Of labeled tokens.", "share right", read_key("validation_accuracy"), lowest=0, is_rare=True),
    Measure("rate", "Learning rate", "As it was applied.", "", read_key("lr"), lowest=0, is_exact=True),
    Measure("gradient", "Gradient norm", "Before clipping, smoothed.", "", read_key("grad_norm"), is_log=True),
    Measure("throughput", "Throughput", "All ranks together, smoothed.", "tokens per second", read_key("tokens_per_second"), lowest=0),
    Measure("mfu", "MFU", "Model FLOPs over the peak of each run's devices, smoothed.", "%", read_key("mfu", 100.0), lowest=0),
    Measure("experts", "Expert load", "Tokens of the most loaded expert over the mean, in the worst block, smoothed.", "most loaded / mean", read_fullest),
)  # fmt: skip


def overlay_plots(records: Sequence[RunRecord]) -> list[Plot]:
    """Make a plot of each measure that any of the runs has, one curve per run."""
    names = name_runs(records)
    plots = []
    for measure in MEASURES:
        curves = []
        for number, record in enumerate(records):
            steps, values = measure.read(record)
            if len(values):
                noisy = not (measure.is_rare or measure.is_exact)
                own = Curve(
                    names[number], steps, values, *curve_style(number), noisy=noisy, dots=measure.is_rare, run=number
                )
                curves.append(own)
        if curves:
            is_log = measure.is_log and min(min(curve.values) for curve in curves) > 0
            spread = [value for curve in curves for value in curve.values]
            highest, remark = cap_outliers(spread) if measure.name in ("throughput", "mfu") else (None, "")
            plots.append(
                Plot(
                    measure.name,
                    measure.title,
                    measure.caption + remark,
                    measure.unit,
                    tuple(curves),
                    is_log=is_log,
                    lowest=measure.lowest,
                    highest=highest,
                    usual=None if is_log or highest is not None else usual_range(curves),
                )
            )
    return plots


def name_runs(records: Sequence[RunRecord]) -> list[str]:
    """Name the runs apart: by their names, or by their directories where two have the same."""
    names = [record.name() for record in records]
    return names if len(set(names)) == len(names) else [str(record.directory) for record in records]


def render_runs(records: Sequence[RunRecord]) -> str:
    """Render the table of the runs, which is the legend: a click on a name hides its curves."""
    head = ("run", "state", "steps", "parameters", "tokens", "loss", "validation", "tokens/s")
    rows = []
    for number, (record, name) in enumerate(zip(records, name_runs(records))):
        series, dash = curve_style(number)
        button = f'<button type="button" data-run="{number}" data-series="{series}" data-dash="{dash}">{escape(name)}</button>'
        tokens, speed = record.last("tokens"), record.typical("tokens_per_second")
        losses = [record.last("loss"), record.last("validation_loss")]
        followed = FollowedRun(record.directory)
        seen = followed.poll()
        cells = [
            f"{describe_state(record, seen)[0].partition(':')[0]}, {judge_run(followed, seen, record).level}",
            f"{record.last_step():,} of {record.num_steps:,}",
            count(record.counts.total),
            "-" if tokens is None else count(tokens),
            *("-" if loss is None else f"{loss:.4f}" for loss in losses),
            "-" if speed is None else count(speed),
        ]
        rows.append(
            f"<tr><td>{button}</td>"
            + "".join(f'<td data-label="{label}">{escape(cell)}</td>' for label, cell in zip(head[1:], cells))
            + "</tr>"
        )
    titles = "".join(f"<th>{title}</th>" for title in head)
    return f'<div class="panel numbers runs"><table><tr>{titles}</tr>{"".join(rows)}</table></div>'


def compare_configs(records: Sequence[RunRecord]) -> Table:
    """Tabulate the settings in which the runs differ: a row per key, a column a run, without names and folders."""
    first = records[0].config
    rows: dict[str, list[str]] = {}
    for number, record in enumerate(records[1:], start=1):
        for item in diff_configs(first, record.config):
            if not item.key.startswith("run."):
                cells = rows.setdefault(item.key, [plain(item.first)] * len(records))
                cells[number] = plain(item.second)
    unset = {plain(None), Difference.absent}  # of a section that one of them lacks
    rows = {key: cells for key, cells in rows.items() if not unset.issuperset(cells)}
    title = "" if rows else "All settings are the same."
    return Table(title, ("setting", *name_runs(records)), tuple((key, *cells) for key, cells in rows.items()), False)


def compare_numbers(records: Sequence[RunRecord]) -> Table:
    """Tabulate how good and how fast the runs are: at the newest step that all have, at as many tokens, and as a whole.

    Losses between two measurements are interpolated; the training loss is smoothed. Of two runs, with the difference.
    """
    step = min(record.last_step() for record in records)
    tokens = [record.last("tokens") for record in records]
    known = [number for number in tokens if number is not None]
    places = [(f"step {step:,}", "step", float(step))]
    if len(known) == len(records) and len({value_at(record.series("tokens"), step) for record in records}) > 1:
        places.append((f"{count(min(known))} tokens", "tokens", min(known)))
    rows: list[tuple[str, Sequence[float | None]]] = [
        (f"{title}, {where}", at_place(records, key, place, axis))
        for where, axis, place in places
        for key, title in COMPARED
    ]
    mfus = [record.typical("mfu") for record in records]
    rows += [
        ("best validation loss", [min(record.series("validation_loss")[1], default=None) for record in records]),
        ("tokens per second", [record.typical("tokens_per_second") for record in records]),
        ("MFU, %", [None if mfu is None or mfu > 1 else 100 * mfu for mfu in mfus]),
        ("hours in steps", [record.seconds() / 3600 for record in records]),
    ]
    header = ("number", *name_runs(records), *(["difference"] if len(records) == 2 else []))
    cells = tuple((name, *show_numbers(values)) for name, values in rows if any(value is not None for value in values))
    return Table("", header, cells, is_summed=False)


COMPARED = (
    ("loss", "training loss"),
    ("validation_loss", "validation loss"),
    ("validation_bits_per_byte", "validation bits per byte"),
)


def at_place(records: Sequence[RunRecord], key: str, place: float, axis: str) -> list[float | None]:
    """Read a measure of each run at a step or at a number of tokens; None for a run that has no such place."""
    found = []
    for record in records:
        steps, values = record.series(key)
        places = steps if axis == "step" else list(map(int, np.interp(steps, *record.series(axis))))
        found.append(value_at((places, smooth(values) if key == "loss" else values), place))
    return found


def value_at(series: Series, place: float) -> float | None:
    """Interpolate a series, whose last value counts for as far as the next one would be; None outside of it."""
    places, values = series
    if not len(places):
        return None
    beyond = places[-1] - places[-2] if len(places) > 1 else 0
    is_inside = places[0] <= place <= places[-1] + beyond
    return float(np.interp(place, places, values)) if is_inside else None


def show_numbers(values: Sequence[float | None]) -> list[str]:
    """Format numbers in five digits; two of them with the second minus the first, and that in per cent."""
    cells = ["-" if value is None else count(value) if value >= 1e4 else f"{value:.5g}" for value in values]
    if len(values) == 2:
        first, second = values
        if first is None or second is None or first == 0:
            return [*cells, "-"]
        cells.append(f"{second - first:+.4g} ({100 * (second / first - 1):+.2f} %)")
    return cells


MAX_PANELS = 4
LEFT_OUT = ("rate", "mfu")  # the schedule is known, and MFU follows throughput


def draw_picture(records: Sequence[RunRecord], path: Path) -> None:
    """Write the first four of the report's plots as one picture; its format follows the suffix of `path`.

    Learning rate and MFU give way to the others. Several runs are over each other. The same runs give the same SVG.
    """
    made = make_plots(records[0]) if len(records) == 1 else overlay_plots(records)
    plots = [plot for plot in made if plot.name not in LEFT_OUT][:MAX_PANELS]
    lines = -(-len(plots) // 2)
    title = describe_run(records[0]) if len(records) == 1 else f"{len(records)} runs"
    with matplotlib.rc_context({**style(LIGHT), "svg.hashsalt": title, "axes.titlelocation": "left"}):
        canvas = Figure(figsize=(9.6, 2.6 * lines + 0.5), layout=ConstrainedLayoutEngine(w_pad=0.12))
        canvas.suptitle(title, x=0.01, ha="left", fontsize=10.5, fontweight="bold")
        panels = list(canvas.subplots(lines, 2, squeeze=False).flat)
        for plot, axes in zip(plots, panels):
            draw_plot(plot, axes, LIGHT)
            axes.set_title(plot.title, fontsize=9.5)
        for axes in panels[len(plots) :]:
            axes.set_axis_off()
        # Without a date and with a fixed salt for ids, a picture kept under version control changes only with its run.
        dates = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
        kind = path.suffix.removeprefix(".")
        with replacing(path) as file:
            canvas.savefig(file, format=kind, dpi=144, metadata=dates.get(kind))


def describe_run(record: RunRecord) -> str:
    """Name, size and result of a run in one line."""
    facts = [f"{short(record.counts.total)} parameters", f"{record.last_step():,} steps"]
    tokens, validation = record.last("tokens"), record.last("validation_loss")
    if tokens is not None:
        facts.append(f"{short(tokens)} tokens")
    if validation is not None:
        facts.append(f"validation loss {validation:.2f}")
    return f"{record.name()}: {', '.join(facts)}"
