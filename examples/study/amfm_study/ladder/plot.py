"""One picture of a ladder: the law through the runs, and what it said of held-out sizes."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from amfm.data_pipeline.durable.files import replacing
from amfm.pretrain.report.numbers import short
from amfm_study.ladder.result import LadderFound, Point
from amfm_study.plots import COLOURS, MARKERS, STYLE

HELD_OUT = "#000000"


def draw_ladder(found: LadderFound, path: Path) -> None:
    """Write a PNG of two panels: loss by tokens, a curve of the law for each size; and predicted against measured losses."""
    with matplotlib.rc_context(STYLE):
        canvas = Figure(figsize=(11, 4.2), layout="constrained")
        left, right = canvas.subplots(1, 2, width_ratios=(1.5, 1))
        draw_sizes(left, found)
        draw_predictions(right, found)
        with replacing(path) as file:
            canvas.savefig(file, format="png", dpi=130, metadata={"Software": None})


def draw_sizes(panel: Axes, found: LadderFound) -> None:
    """Runs by tokens, and the law for active parameters; held-out sizes are black, and their law is dashed."""
    law = found.laws["active"].law
    ends = [point.tokens for point in found.points]
    tokens = np.geomspace(min(ends) / 1.15, max(ends) * 1.15, 100)
    for index, (size, points) in enumerate(by_size(found).items()):
        held_out = points[0].held_out
        color = HELD_OUT if held_out else COLOURS[index % (len(COLOURS) - 1)]
        marker = MARKERS[index % len(MARKERS)]
        label = f"{size}: {short(points[0].active)} active" + (", held out" if held_out else "")
        panel.plot(tokens, law.predict(points[0].active, tokens), "--" if held_out else "-", color=color, linewidth=1.1)
        losses = [point.loss for point in points]
        panel.plot([point.tokens for point in points], losses, marker, color=color, label=label)
    for prediction in found.predictions("active"):
        below, above = prediction.predicted - prediction.low, prediction.high - prediction.predicted
        bars = [[max(0.0, below)], [max(0.0, above)]]
        panel.errorbar([prediction.point.tokens], [prediction.predicted], bars, color=HELD_OUT, capsize=3, linewidth=1)
    panel.set_xscale("log")
    panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.xaxis.set_major_formatter(FuncFormatter(short))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.set_title("Loss by tokens; lines: the law, bars: its prediction")
    panel.set_xlabel("tokens")
    panel.set_ylabel("validation loss, nats per token")
    panel.legend()


def draw_predictions(panel: Axes, found: LadderFound) -> None:
    """Measured losses by what the law for active parameters says, and where both would be equal."""
    law = found.laws["active"].law
    for held_out, label, face in ((False, "fitted", "none"), (True, "held out", HELD_OUT)):
        points = [point for point in found.points if point.held_out == held_out]
        predicted = [float(law.predict(point.active, point.tokens)) for point in points]
        edge = HELD_OUT if held_out else COLOURS[0]
        panel.plot(
            predicted, [point.loss for point in points], "o", markerfacecolor=face, markeredgecolor=edge, label=label
        )
    losses = [point.loss for point in found.points]
    panel.plot([min(losses), max(losses)], [min(losses), max(losses)], color="#7f7f7f", linewidth=1)
    for prediction in found.predictions("active"):
        place = prediction.predicted, prediction.point.loss
        panel.annotate(f"{prediction.error_percent:+.2f}%", place, (8, -4), textcoords="offset points")
    panel.set_title("Is the law right?")
    panel.set_xlabel("predicted, nats per token")
    panel.set_ylabel("measured, nats per token")
    panel.legend()


def by_size(found: LadderFound) -> dict[str, list[Point]]:
    """Points of each size, from the smallest."""
    sizes: dict[str, list[Point]] = {}
    for point in found.points:
        sizes.setdefault(point.size, []).append(point)
    return sizes
