"""Progress display: a live panel on a terminal, plain lines anywhere else, all on standard error.

Standard output belongs to results, which other programs read. A log file of a cluster job gets a line every
`log_every_steps` steps, without control characters; a terminal gets a panel that is redrawn in place, with remarks
scrolling above it. Both show the same numbers, those of metrics.jsonl, and the display keeps nothing that a run needs.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from pretrain.config.schema import RunConfig

BARS = "▁▂▃▄▅▆▇█"
SPARKLINE_WIDTH = 48
AVERAGED_STEPS = 20


class Display:
    """Shows the steps of one start of a run; exists on the main rank alone.

    `first_step`: steps that were done before. Keeps the newest 400 losses for the curve, and the seconds of the newest
    AVERAGED_STEPS steps for the estimate of what is left.
    """

    def __init__(self, config: RunConfig, *, first_step: int, last_step: int, console: Console | None = None) -> None:
        self.config = config
        self.first_step = first_step
        self.last_step = last_step
        self.console = console or Console(file=sys.stderr, highlight=False, soft_wrap=True)
        self.losses: deque[float] = deque(maxlen=400)
        self.seconds: deque[float] = deque(maxlen=AVERAGED_STEPS)
        self.validation_loss: float | None = None
        self.accuracy = ""
        self.name = config.run.name or config.run.dir.rstrip("/").rsplit("/", 1)[-1]
        self.live: Live | None = None
        if self.console.is_terminal:
            self.live = Live(console=self.console, refresh_per_second=4, transient=False)
            self.live.start()

    def say(self, text: str) -> None:
        """Print a remark between steps; on a terminal it scrolls above the panel."""
        self.console.print(escape(text))

    def show(self, metrics: dict[str, Any]) -> None:
        """Show a step's line of metrics.jsonl: update the panel, or print a line if one is due."""
        if metrics["loss"] is not None:
            self.losses.append(metrics["loss"])
        self.seconds.append(metrics["seconds"])
        self.validation_loss = metrics.get("validation_loss", self.validation_loss)
        if "validation_accuracy" in metrics:
            self.accuracy = show_accuracy(metrics)
        if self.live is not None:
            self.live.update(self.draw_panel(metrics))
        elif self.is_line_due(metrics):
            self.console.print(escape(self.format_line(metrics)))

    def close(self) -> None:
        """Stop updating; the last panel stays on the terminal."""
        if self.live is not None:
            self.live.stop()

    def is_line_due(self, metrics: dict[str, Any]) -> bool:
        """Whether to print a step: the first and last one, every `log_every_steps`, and whatever is unusual."""
        step = metrics["step"]
        return (
            step % self.config.train.log_every_steps == 0
            or step in (self.first_step + 1, self.last_step)
            or metrics["skipped"]
            or "validation_loss" in metrics
        )

    def remaining(self, step: int) -> str:
        """Estimate the time to the last step at the mean pace of the last AVERAGED_STEPS steps."""
        pace = sum(self.seconds) / len(self.seconds)
        return format_duration(pace * (self.last_step - step))

    def format_line(self, metrics: dict[str, Any]) -> str:
        """Format a step as one line without control characters."""
        step = metrics["step"]
        parts = [
            f"step {step}/{self.last_step}",
            f"loss {show_number(metrics['loss'], '.4f')}",
            f"grad norm {show_number(metrics['grad_norm'], '.3f')}",
            f"lr {metrics['lr']:.2e}",
            f"{metrics['tokens_per_second']:,.0f} tokens/s",
            f"MFU {metrics['mfu']:.1%}",
        ]
        if metrics["expert_load"]:
            parts.append(f"expert load {max(metrics['expert_load'].values()):.2f}")
        if "validation_loss" in metrics:
            parts.append(f"validation loss {show_number(metrics['validation_loss'], '.4f')}")
        if "validation_accuracy" in metrics:
            parts.append(show_accuracy(metrics))
        if metrics["skipped"]:
            parts.append("SKIPPED")
        return ", ".join([*parts, f"{self.remaining(step)} left"])

    def draw_panel(self, metrics: dict[str, Any]) -> Panel:
        """Draw the live panel: progress, loss curve, validation, gradients, pace and, with MoE blocks, load of experts."""
        step = metrics["step"]
        bar = Table.grid(padding=(0, 1))
        bar.add_row(
            ProgressBar(total=self.last_step, completed=step, width=SPARKLINE_WIDTH),
            f"{step:,}/{self.last_step:,}",
            f"{self.remaining(step)} left",
        )
        curve = Table.grid(padding=(0, 1))
        curve.add_row(Text(draw_sparkline(self.losses), style="cyan"), f"loss {show_number(metrics['loss'], '.4f')}")
        facts = Table.grid(padding=(0, 3))
        facts.add_row(
            f"validation {show_number(self.validation_loss, '.4f')}",
            f"grad norm {show_number(metrics['grad_norm'], '.3f')}",
            f"lr {metrics['lr']:.2e}",
        )
        facts.add_row(
            f"{metrics['tokens_per_second']:,.0f} tokens/s",
            f"MFU {metrics['mfu']:.1%}",
            f"{metrics['tokens']:,} tokens",
        )
        rows: list[Any] = [bar, curve, facts]
        if self.accuracy:
            rows.append(Text(self.accuracy))
        if metrics["expert_load"]:
            loads = "  ".join(f"{block}: {load:.2f}" for block, load in metrics["expert_load"].items())
            rows.append(
                Text(f"fullest expert / mean by block  {loads}", style="dim", overflow="ellipsis", no_wrap=True)
            )
        return Panel(Group(*rows), title=f"amfm train {escape(self.name)}", title_align="left", expand=False)


def draw_sparkline(values: Sequence[float]) -> str:
    """Draw values as a row of bars: means of equal runs of values, scaled between the smallest and the largest mean."""
    if not values:
        return ""
    numbers = list(values)
    width = min(SPARKLINE_WIDTH, len(numbers))
    edges = [round(index * len(numbers) / width) for index in range(width + 1)]
    means = [sum(numbers[start:stop]) / (stop - start) for start, stop in pairwise(edges)]
    low, high = min(means), max(means)
    # A flat curve has no span; it is drawn as the lowest bars.
    span = (high - low) or 1.0
    return "".join(BARS[min(len(BARS) - 1, int((mean - low) / span * len(BARS)))] for mean in means)


def show_accuracy(metrics: dict[str, Any]) -> str:
    """Format the accuracy on a synthetic task, of tokens and of whole rows."""
    tokens, rows = metrics["validation_accuracy"], metrics["validation_row_accuracy"]
    return f"validation accuracy {tokens:.1%} of tokens, {rows:.1%} of rows"


def show_number(value: float | None, form: str) -> str:
    """Format a number; a dash for None: not measured, or not finite, which the log writes as null."""
    return "-" if value is None else format(value, form)


def format_duration(seconds: float) -> str:
    """Format seconds as hours, minutes and seconds, the two largest that count."""
    whole = int(seconds + 0.5)
    hours, minutes = divmod(whole // 60, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{whole % 60:02d}s" if minutes else f"{whole}s"
