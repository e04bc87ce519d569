"""The plots of a report: drawn by matplotlib, and turned into inline SVG whose colours follow the page's theme.

A `Plot` holds a function that draws on any axes in any colours, so the same plot serves the page (SVG) and the picture
(picture.py). For the page it is drawn in stand-in colours that occur nowhere else; `themed` replaces them by variables of
the style sheet, so that one SVG serves light and dark without a script. Text stays text (`svg.fonttype: none`): it is
small, can be searched and takes the page's font.

Each function returns None when the run has no such measurement, and no empty figure is shown. Series with a value
for every step are thinned to MAX_POINTS means, so that the page of a long run stays small.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from pretrain.report.colours import THEMED, Colours
from pretrain.report.data import RunRecord, thin

MAX_POINTS = 800
MAX_COLUMNS = 160


@dataclass(frozen=True)
class Plot:
    """A figure: title, one line on what to see in it, and what draws it on a pair of axes over steps."""

    name: str
    title: str
    caption: str
    draw: Callable[[Any, Colours], None]

    def svg(self) -> str:
        """Render the SVG element, in the page's variables for colours and with ids that are unique on the page."""
        with matplotlib.rc_context({**style(THEMED), "svg.hashsalt": self.name}):
            canvas = Figure(figsize=(4.5, 2.6), layout="constrained")
            self.draw_over_steps(canvas.subplots(), THEMED)
            buffer = io.StringIO()
            canvas.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
        return themed(buffer.getvalue(), self.name)

    def draw_over_steps(self, axes: Any, colours: Colours) -> None:
        """Draw on a pair of axes, and label the horizontal one as steps, in whole numbers."""
        self.draw(axes, colours)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
        axes.xaxis.set_major_formatter(FuncFormatter(short))
        axes.set_xlabel("step")


def make_plots(record: RunRecord) -> list[Plot]:
    """Make every plot for which the run has measurements, in the order of the page."""
    drawings: list[Callable[[RunRecord], Plot | None]] = [
        loss_plot,
        accuracy_plot,
        learning_rate_plot,
        gradient_norm_plot,
        throughput_plot,
        expert_load_plot,
        auxiliary_plot,
    ]
    return [plot for plot in (draw(record) for draw in drawings) if plot is not None]


def loss_plot(record: RunRecord) -> Plot | None:
    """Plot training loss, faint for each step and strong smoothed, and validation loss, in nats a token."""
    steps, losses = record.series("loss")
    if not losses:
        return None

    def draw(axes: Any, colours: Colours) -> None:
        draw_line(axes, steps, losses, colours.series[0], faint=len(losses) > 20)
        if len(losses) > 20:
            draw_line(axes, steps, smooth(losses), colours.series[0], label="training, smoothed")
        validated, validation = record.series("validation_loss")
        if validation:
            axes.plot(validated, validation, color=colours.series[1], marker="o", markersize=3, label="validation")
        axes.set_ylabel("nats a token")
        if axes.get_legend_handles_labels()[0]:
            axes.legend(loc="best")

    return Plot("loss", "Loss", "Negative log-likelihood of a token; perplexity is its exponential.", draw)


def accuracy_plot(record: RunRecord) -> Plot | None:
    """Plot the accuracy on a synthetic task, of tokens and of whole rows."""
    steps, tokens = record.series("validation_accuracy")
    if not tokens:
        return None
    _, rows = record.series("validation_row_accuracy")

    def draw(axes: Any, colours: Colours) -> None:
        for number, (label, values) in enumerate((("tokens", tokens), ("rows", rows))):
            axes.plot(steps, values, color=colours.series[number], marker="o", markersize=3, label=label)
        axes.set_ylim(0, 1.02)
        axes.set_ylabel("share right")
        axes.legend(loc="best")

    return Plot(
        "accuracy",
        "Accuracy",
        "Validation: share of labelled tokens that are right, and of rows without a wrong one.",
        draw,
    )


def learning_rate_plot(record: RunRecord) -> Plot | None:
    """Plot the learning rate as it was applied, over all stages."""
    steps, rates = record.series("lr")
    if not rates:
        return None

    def draw(axes: Any, colours: Colours) -> None:
        draw_line(axes, steps, rates, colours.series[2])
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))

    kinds = ", ".join(f"{stage.name} {stage.schedule.kind}" for stage in record.stages)
    caption = f"By stage: {kinds}." if record.config.stages else f"Schedule {record.config.schedule.kind}."
    return Plot("rate", "Learning rate", caption, draw)


def gradient_norm_plot(record: RunRecord) -> Plot | None:
    """Plot the global gradient norm before clipping, on a logarithmic axis if no norm is zero; the clip limit dashed."""
    steps, norms = record.series("grad_norm")
    if not norms:
        return None
    limit = record.config.optimizer.clip_grad_norm

    def draw(axes: Any, colours: Colours) -> None:
        draw_line(axes, steps, norms, colours.series[3])
        if min(norms) > 0:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.yaxis.set_major_formatter(FuncFormatter(short))
            axes.yaxis.set_minor_formatter(NullFormatter())
        if limit is not None:
            axes.axhline(limit, color=colours.ink, linewidth=0.8, linestyle=(0, (4, 3)))

    caption = "Before clipping." if limit is None else f"Before clipping; clipped above {limit:g} (dashed)."
    return Plot("gradient", "Gradient norm", caption, draw)


def throughput_plot(record: RunRecord) -> Plot | None:
    """Plot tokens a second of all ranks, with model FLOPs utilisation (MFU) as a second scale where it was logged."""
    steps, speeds = record.series("tokens_per_second")
    if not speeds:
        return None
    mfu = record.series("mfu")[1]

    def draw(axes: Any, colours: Colours) -> None:
        draw_line(axes, steps, speeds, colours.series[4])
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(FuncFormatter(short))
        axes.set_ylabel("tokens / s")
        if mfu:
            # MFU is tokens a second times a constant, so it is a second scale of the same line.
            ratio = 100 * median(mfu) / median(speeds[-len(mfu) :])
            right = axes.twinx()
            right.grid(visible=False)
            right.set_ylim(0, axes.get_ylim()[1] * ratio)
            right.set_ylabel("MFU %")

    caption = "All ranks together." + (" MFU: model FLOPs over the device's peak." if mfu else "")
    return Plot("throughput", "Throughput", caption, draw)


def expert_load_plot(record: RunRecord) -> Plot | None:
    """Map the tokens of the fullest expert over the mean: a row for each MoE block, a column for each span of steps.

    1 is even load. The largest value possible is experts / choices a token: every token takes the same ones.
    """
    loads = record.named_series("expert_load")
    if not loads:
        return None
    blocks = sorted(loads, key=lambda name: (len(name), name))
    rows = [thin(*loads[block], limit=MAX_COLUMNS)[1] for block in blocks]
    width = max(len(row) for row in rows)
    # Blocks may have logged different numbers of steps; what is missing at the end stays blank.
    grid = np.full((len(rows), width), np.nan)
    for index, row in enumerate(rows):
        grid[index, : len(row)] = row
    first, last = loads[blocks[0]][0][0], loads[blocks[0]][0][-1]

    def draw(axes: Any, colours: Colours) -> None:
        # Half a step on either side, so that a single step still has a width.
        extent = (first - 0.5, last + 0.5, len(rows) - 0.5, -0.5)
        top = max(1.2, float(np.nanmax(grid)))
        image = axes.imshow(
            grid, aspect="auto", interpolation="nearest", cmap="viridis", vmin=1.0, vmax=top, extent=extent
        )
        axes.grid(visible=False)
        shown = range(0, len(blocks), max(1, len(blocks) // 10))
        axes.set_yticks(list(shown), [blocks[index] for index in shown])
        axes.set_ylabel("block")
        bar = axes.figure.colorbar(image, ax=axes, pad=0.02, aspect=16)
        bar.outline.set_visible(False)
        bar.set_label("fullest / mean")
        bar.ax.yaxis.set_major_locator(MaxNLocator(4))

    moe = record.config.model.moe
    most = "" if moe is None else f"; {moe.num_experts / moe.top_k:g}, the most possible, is collapse"
    caption = f"Tokens of the fullest expert over the mean, by MoE block: 1 is even{most}."
    return Plot("experts", "Expert load", caption, draw)


def auxiliary_plot(record: RunRecord) -> Plot | None:
    """Plot the auxiliary losses, weighted as they enter the loss; those that are zero throughout are left out."""
    series = {name: pair for name, pair in record.named_series("auxiliary").items() if any(pair[1])}
    if not series:
        return None

    def draw(axes: Any, colours: Colours) -> None:
        for (name, (steps, values)), colour in zip(
            series.items(), colours.series * (1 + len(series) // len(colours.series))
        ):
            draw_line(axes, steps, values, colour, label=name.replace("_", " "))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
        axes.legend(loc="best")

    return Plot("auxiliary", "Auxiliary losses", "Weighted, as they are added to the loss.", draw)


def draw_line(
    axes: Any, steps: Sequence[int], values: Sequence[float], colour: str, *, label: str = "", faint: bool = False
) -> None:
    """Draw one series, thinned; a single point gets a marker, since a line would not show."""
    x, y = thin(steps, values, MAX_POINTS)
    marker = "o" if len(x) == 1 else ""
    axes.plot(
        x,
        y,
        color=colour,
        marker=marker,
        markersize=4,
        label=label or "_hidden",
        alpha=0.35 if faint else 1.0,
        linewidth=0.9 if faint else 1.5,
    )


def smooth(values: Sequence[float]) -> list[float]:
    """Smooth by an exponential mean over about a hundredth of the run.

    Dividing by the sum of weights corrects the start, where few values have come in.
    """
    keep = 1 - 1 / max(2.0, len(values) / 100)
    total = weight = 0.0
    smoothed = []
    for value in values:
        total, weight = keep * total + value, keep * weight + 1
        smoothed.append(total / weight)
    return smoothed


def short(value: float, _position: int | None = None) -> str:
    """Format a number for tick labels in three digits and a unit prefix: 12345 -> 12.3k."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


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
