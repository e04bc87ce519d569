"""One picture of a study of rates: loss by rate, a line per size."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from amfm.data_pipeline.durable.files import replacing
from amfm_study.ladder.rates import RatesFound
from amfm_study.plots import COLOURS, MARKERS, STYLE


def draw_rates(found: RatesFound, path: Path) -> None:
    """Write a PNG; a vertical line is at each best rate that is inside of the rates tried."""
    with matplotlib.rc_context(STYLE):
        canvas = Figure(figsize=(6.4, 4.2), layout="constrained")
        panel = canvas.subplots()
        for index, size in enumerate(found.sizes):
            color, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
            label = f"{size.size}: width {size.width}, depth {size.depth}"
            panel.plot(list(size.losses), list(size.losses.values()), color=color, marker=marker, label=label)
            if not size.at_edge:
                panel.axvline(size.best, color=color, linestyle=":", linewidth=1)
        panel.set_xscale("log")
        panel.set_xticks(sorted({rate for size in found.sizes for rate in size.losses}))
        panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        panel.xaxis.set_minor_locator(NullLocator())
        panel.set_title("Best rate of each size (dotted)")
        panel.set_xlabel("peak learning rate")
        panel.set_ylabel("validation loss, nats per token")
        panel.legend()
        with replacing(path) as file:
            canvas.savefig(file, format="png", dpi=130, metadata={"Software": None})
