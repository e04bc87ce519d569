"""Several runs on one page: their curves over each other, what they reached, and the settings in which they differ.

A run keeps its colour and dashes in every plot and in the table that is the page's legend. Curves of one measure are one
plot, and noisy ones are smoothed over about a hundredth of each run, so that it shows differences between runs rather
than noise between batches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from amfm.pretrain.config.file import diff_configs
from amfm.pretrain.report.data import RunRecord
from amfm.pretrain.report.draw import DASHES
from amfm.pretrain.report.numbers import count, plain, smooth
from amfm.pretrain.report.page import Table
from amfm.pretrain.report.plots import Curve, Plot, cap_outliers

NUM_COLOURS = 6
MAX_RUNS = NUM_COLOURS * len(DASHES)
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
    Measure("bits", "Validation, bits per byte", "Comparable where tokenizers differ.", "bits per byte", read_key("validation_bits_per_byte"), is_rare=True),
    Measure("accuracy", "Validation accuracy", "Of labelled tokens.", "share right", read_key("validation_accuracy"), lowest=0, is_rare=True),
    Measure("rate", "Learning rate", "As it was applied.", "", read_key("lr"), lowest=0, is_exact=True),
    Measure("gradient", "Gradient norm", "Before clipping, smoothed.", "", read_key("grad_norm"), is_log=True),
    Measure("throughput", "Throughput", "All ranks together, smoothed.", "tokens per second", read_key("tokens_per_second"), lowest=0),
    Measure("mfu", "MFU", "Model FLOPs over the peak of each run's devices, smoothed.", "%", read_key("mfu", 100.0), lowest=0),
    Measure("experts", "Expert load", "Tokens of the fullest expert over the mean, in the worst block, smoothed.", "fullest / mean", read_fullest),
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
                series, dash = colour_of(number)
                shown = values if measure.is_rare or measure.is_exact else smooth(values)
                curves.append(Curve(names[number], steps, shown, series, dash, dots=measure.is_rare, run=number))
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
                )
            )
    return plots


def colour_of(run: int) -> tuple[int, int]:
    """Choose colour and dashes of a run by its number, the same everywhere on the page."""
    return run % NUM_COLOURS, run // NUM_COLOURS


def name_runs(records: Sequence[RunRecord]) -> list[str]:
    """Name the runs apart: by their names, or by their directories where two have the same."""
    names = [record.name() for record in records]
    return names if len(set(names)) == len(names) else [str(record.directory) for record in records]


def render_runs(records: Sequence[RunRecord]) -> str:
    """Render the table of the runs, which is the legend: a click on a name hides its curves."""
    head = ("run", "steps", "parameters", "tokens", "loss", "validation", "tokens/s")
    rows = []
    for number, (record, name) in enumerate(zip(records, name_runs(records))):
        series, dash = colour_of(number)
        button = f'<button type="button" data-run="{number}" data-series="{series}" data-dash="{dash}">{escape(name)}</button>'
        tokens, speed = record.last("tokens"), record.typical("tokens_per_second")
        losses = [record.last("loss"), record.last("validation_loss")]
        cells = [
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
    title = "" if rows else "All settings are the same."
    return Table(title, ("setting", *name_runs(records)), tuple((key, *cells) for key, cells in rows.items()), False)
