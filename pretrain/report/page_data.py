"""What a page's script gets: runs and plots as JSON values, short enough for runs of any length.

A curve has MAX_POINTS points at most, and a plot twice as many, shared by its curves: longer ones keep the extremes of equal
spans, and noisy ones mean, lowest and highest value of each, so that the script draws an envelope and smooths as a reader
asks. Numbers have five digits, more than a pixel can show. Steps are turned into tokens and hours by a table for each run.

Tasks of lm-eval in a report: shares that are right as curves over the steps, and every value in a table.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from amfm.pretrain.report.curves import Curve, HeatMap, Plot, curve_style, make_marks, make_stages
from amfm.pretrain.report.data import RunRecord, is_number
from amfm.pretrain.report.numbers import keep_extremes, make_columns
from amfm.pretrain.report.page import Table

# Metrics between 0 and 1, of which more is better; others (perplexities, bits) have their own scales.
SHARES = ("acc", "acc_norm", "exact_match", "f1", "mc1", "mc2", "prompt_level_strict_acc")
MAX_CURVES = 8


def tasks_plot(record: RunRecord) -> Plot | None:
    """Plot what share of each task is right, over the steps; the first few tasks. None if no task was measured."""
    series = {name: pair for name, pair in record.named_series("tasks").items() if metric_of(name) in SHARES}
    if not series:
        return None
    shown = list(series.items())[:MAX_CURVES]
    curves = tuple(Curve(name, *pair, *curve_style(number), dots=True) for number, (name, pair) in enumerate(shown))
    rest = len(series) - len(shown)
    caption = "lm-eval on the model as it trains." + (f" {rest} more are in the table below." if rest else "")
    return Plot("tasks", "Tasks", caption, "share right", curves, lowest=0)


def describe_tasks(record: RunRecord) -> Table | None:
    """Tabulate each metric of each task: first, and newest. None if no task was measured."""
    series = record.named_series("tasks")
    if not series:
        return None
    rows = tuple(
        (name, f"{values[0]:.4g}", f"{steps[0]:,}", f"{values[-1]:.4g}", f"{steps[-1]:,}")
        for name, (steps, values) in series.items()
    )
    header = ("metric", "first", "after step", "newest", "after step")
    return Table("lm-eval: task/metric/filter", header, rows, is_summed=False)


def metric_of(name: str) -> str:
    """Name of the metric in TASK/METRIC or TASK/METRIC/FILTER."""
    return name.split("/")[1] if "/" in name else name


MAX_POINTS, MIN_POINTS = 1500, 300
MAX_PLACES = 400


def describe_page(records: Sequence[RunRecord], plots: Sequence[Plot]) -> dict[str, Any]:
    """Collect the values of a page: of each run steps, tokens, hours and what happened, and every plot."""
    return {"runs": [describe_places(record) for record in records], "plots": [describe_plot(plot) for plot in plots]}


def describe_places(record: RunRecord) -> dict[str, Any]:
    """Tabulate tokens, hours inside steps and rates at MAX_PLACES of a run's steps; empty lists where one was not logged.

    With its name, its marks and its stages.
    """
    lines = record.metrics
    every = max(1, len(lines) // MAX_PLACES)
    places = sorted({*range(0, len(lines), every), len(lines) - 1})
    seconds = list(accumulate(float(line["seconds"]) if is_number(line.get("seconds")) else 0.0 for line in lines))
    tokens, rates = ([lines[place].get(name) for place in places] for name in ("tokens", "lr"))
    return {
        "name": record.name(),
        "marks": [[mark.step, mark.kind, mark.number, mark.text] for mark in make_marks(record)],
        "stages": [[stage.first, stage.last, stage.name] for stage in make_stages(record)],
        "steps": [int(lines[place]["step"]) for place in places],
        "tokens": [float(value) for value in tokens if is_number(value)] if all(map(is_number, tokens)) else [],
        "rates": [_rounded(value, 5) for value in rates if is_number(value)] if all(map(is_number, rates)) else [],
        "hours": [_rounded(seconds[place] / 3600, 6) for place in places] if seconds[-1] > 0 else [],
    }


def describe_plot(plot: Plot) -> dict[str, Any]:
    """One plot as JSON values."""
    limit = max(MIN_POINTS, min(MAX_POINTS, 2 * MAX_POINTS // max(1, len(plot.curves))))
    return {
        "name": plot.name,
        "title": plot.title,
        "unit": plot.unit,
        "log": plot.is_log,
        "lowest": plot.lowest,
        "highest": plot.highest,
        "limit": plot.limit,
        "usual": plot.usual and [_rounded(end, 5) for end in plot.usual],
        "curves": [describe_curve(curve, limit) for curve in plot.curves],
        "heat": None if plot.heat is None else describe_heat(plot.heat),
    }


def describe_curve(curve: Curve, limit: int) -> dict[str, Any]:
    """One curve of at most `limit` points as JSON values; lows and highs: of a noisy one whose points stand for several."""
    ends: dict[str, list[float]] = {}
    steps: Sequence[int]
    values: Sequence[float]
    if curve.noisy:
        columns = make_columns(curve.steps, curve.values, limit)
        steps, values = columns.steps, columns.means
        if len(steps) < len(curve.steps):
            found = {"lows": columns.lows, "highs": columns.highs}
            ends = {name: [_rounded(value, 5) for value in own] for name, own in found.items()}
    else:
        steps, values = keep_extremes(curve.steps, curve.values, limit)
    return {
        "name": curve.name,
        "run": curve.run,
        "series": curve.series,
        "dash": curve.dash,
        "noisy": curve.noisy,
        "envelope": curve.has_envelope,
        "dots": curve.dots,
        "steps": list(steps),
        "values": [_rounded(value, 5) for value in values],
        **ends,
    }


def describe_heat(heat: HeatMap) -> dict[str, Any]:
    """One map as JSON values; null if nothing was measured."""
    rows = [[None if value is None else _rounded(value, 3) for value in row] for row in heat.rows]
    return {
        "names": list(heat.names),
        "edges": [_rounded(edge, 9) for edge in heat.edges],
        "rows": rows,
        "lowest": heat.lowest,
        "highest": _rounded(heat.highest, 4),
        "log": heat.is_log,
    }


def _rounded(value: float, digits: int) -> float:
    return float(f"{value:.{digits}g}")
