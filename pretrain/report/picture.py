"""One picture of a run for a page or a talk: loss, balance of experts, speed and gradients, with the run's size above.

The plots are those of the report, drawn in its light colours on one canvas of up to two by two panels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from amfm.data_pipeline.durable.files import replacing
from amfm.pretrain.report.data import RunRecord
from amfm.pretrain.report.draw import draw_plot, style
from amfm.pretrain.report.numbers import LIGHT, short
from amfm.pretrain.report.overlay import overlay_plots
from amfm.pretrain.report.plots import make_plots

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
