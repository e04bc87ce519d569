"""Tasks of lm-eval in a report: shares that are right as curves over the steps, and every value in a table."""

from __future__ import annotations

from amfm.pretrain.report.data import RunRecord
from amfm.pretrain.report.page import Table
from amfm.pretrain.report.plots import Curve, Plot

# Metrics between 0 and 1, of which more is better; others (perplexities, bits) have their own scales.
SHARES = ("acc", "acc_norm", "exact_match", "f1", "mc1", "mc2", "prompt_level_strict_acc")
MAX_CURVES = 8


def tasks_plot(record: RunRecord) -> Plot | None:
    """Plot what share of each task is right, over the steps; the first few tasks. None where no task was measured."""
    series = {name: pair for name, pair in record.named_series("tasks").items() if metric_of(name) in SHARES}
    if not series:
        return None
    shown = list(series.items())[:MAX_CURVES]
    curves = tuple(
        Curve(name, *pair, series=number % 6, dash=number // 6, dots=True) for number, (name, pair) in enumerate(shown)
    )
    rest = len(series) - len(shown)
    caption = "lm-eval on the model as it trains." + (f" {rest} more are in the table below." if rest else "")
    return Plot("tasks", "Tasks", caption, "share right", curves, lowest=0)


def describe_tasks(record: RunRecord) -> Table | None:
    """Tabulate each metric of each task: first, and newest. None where no task was measured."""
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
