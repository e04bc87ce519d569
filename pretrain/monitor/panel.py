"""The panel of a run: progress, loss, pace, memory and the newest checkpoint, in a few lines of a terminal.

Drawn from the lines that a run logs, so that the run itself (display.py) and whoever watches it from another machine
(follow.py) show the same.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from rich.console import Group
from rich.markup import escape
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from amfm.data_pipeline.terminal import printable

BARS, PLAIN_BARS = "▁▂▃▄▅▆▇█", "_.-=+*%#"  # the latter where the terminal's encoding lacks the former
SPARKLINE_WIDTH, HISTORY_WIDTH = 48, 36
KEPT_LOSSES = 400
WIDE = 118  # columns of a terminal that shows what was next to what is
CURVES = (("loss", ".4f"), ("grad_norm", ".3f"), ("tokens_per_second", ",.0f"))
KEPT_EVENTS = 5
AVERAGED_STEPS = 20
LEAST_STEPS = 3  # for a time left: the first steps warm up, and one may hold a pause of the machine


class RunState:
    """What the lines of a run tell about it: newest step, curve of the loss, pace and newest checkpoint.

    `first_step`, `last_step`: where this start of the run begins and ends. `num_steps`: of the whole run, where that is more.
    `is_over`: nothing more comes of this start, so no time is left. `bars`: characters of the curve. `began`: when it started, seconds since the
    epoch, None while that is not known. `status` is its own line at the panel's foot. `shows_mfu`: false on a CPU, whose peak
    is measured at the start, in what other programs leave of it.
    """

    def __init__(self, name: str, *, first_step: int, last_step: int, began: float | None) -> None:
        self.name, self.first_step, self.last_step, self.began = name, first_step, last_step, began
        self.num_steps, self.is_over, self.bars = last_step, False, BARS
        self.metrics: dict[str, Any] | None = None
        self.curves: dict[str, deque[float]] = {name: deque(maxlen=KEPT_LOSSES) for name, _ in CURVES}
        self.events: deque[str] = deque(maxlen=KEPT_EVENTS)  # of whoever watches
        self.seconds: deque[float] = deque(maxlen=AVERAGED_STEPS)
        self.validation_loss: float | None = None
        self.accuracy = ""
        self.checkpoint_step: int | None = None
        self.checkpoint_time: float | None = None
        self.status = ""
        self.verdict = ""  # of whoever watches: a run does not judge itself
        self.shows_mfu = True

    def take_metrics(self, metrics: dict[str, Any]) -> None:
        """Take a step's line of metrics.jsonl."""
        self.metrics = metrics
        for name, curve in self.curves.items():
            if metrics.get(name) is not None:
                curve.append(metrics[name])
        self.seconds.append(metrics["seconds"])
        self.validation_loss = metrics.get("validation_loss", self.validation_loss)
        if "validation_accuracy" in metrics:
            self.accuracy = show_accuracy(metrics)

    def take_checkpoint(self, step: int, when: float) -> None:
        """Note that the checkpoint of a step stands since `when`, seconds since the epoch."""
        self.checkpoint_step, self.checkpoint_time = step, when

    def remaining(self) -> str:
        """Time to the last step at the median pace of the last AVERAGED_STEPS steps; empty before LEAST_STEPS of them.

        With the time of day at which that is, where it is a minute or more. Empty for a start that is over.
        """
        if self.metrics is None or len(self.seconds) < LEAST_STEPS or self.is_over:
            return ""
        left = statistics.median_low(self.seconds) * max(0, self.last_step - self.metrics["step"])
        now = self.metrics.get("time")
        done = f", done {show_clock(now + left, now)}" if isinstance(now, float) and left >= 60 else ""
        return f"{format_duration(left)} left{done}"

    def elapsed(self) -> str:
        """Time since this start began, of one that is over up to its newest step; empty if that is not known."""
        if self.began is None:
            return ""
        if not self.is_over:
            return f"elapsed {since(self.began)}   "
        last = (self.metrics or {}).get("time")
        return f"ran {format_duration(max(0.0, last - self.began))}   " if isinstance(last, float) else ""

    def place(self, step: int) -> str:
        """Step of how many, and where this start stops before."""
        stops = f", stops at {self.last_step:,}" if self.last_step < self.num_steps else ""
        return f"{step:,}/{max(self.last_step, self.num_steps):,}{stops}"

    def steps_at_stake(self) -> int:
        """Steps since the newest checkpoint, the one under way included."""
        current_step = (self.first_step if self.metrics is None else self.metrics["step"]) + 1
        return max(0, min(current_step, self.last_step) - (self.checkpoint_step or 0))

    def describe_checkpoint(self) -> str:
        """Report which checkpoint a restart would find, and how old it is."""
        if self.checkpoint_step is None:
            return "no checkpoint yet"
        age = "" if self.checkpoint_time is None else f", {since(self.checkpoint_time)} ago"
        return f"checkpoint of step {self.checkpoint_step:,}{age}"

    def is_line_due(self, metrics: dict[str, Any], every_steps: int) -> bool:
        """Whether a log should have a line of a step.

        The first and last, one in `every_steps`, and whatever is unusual.
        """
        step = metrics["step"]
        return (
            step % every_steps == 0
            or step in (self.first_step + 1, self.last_step)
            or metrics["skipped"]
            or "validation_loss" in metrics
            or "validation_sets" in metrics
        )

    def format_line(self, metrics: dict[str, Any]) -> str:
        """Format a step as one line without control characters; it begins with the time of day, where that was written."""
        when = metrics.get("time")
        clock = time.strftime("%H:%M:%S ", time.localtime(when)) if isinstance(when, float) else ""
        parts = [
            f"{clock}step {self.place(metrics['step'])}",
            f"loss {show_number(metrics['loss'], '.4f')}",
            f"grad norm {show_number(metrics['grad_norm'], '.3f')}",
            f"lr {metrics['lr']:.2e}",
            f"{metrics['tokens_per_second']:,.0f} tokens/s",
            *self.describe_mfu(metrics),
        ]
        if metrics["expert_load"]:
            parts.append(f"max expert load {max(metrics['expert_load'].values()):.2f}")
        if "validation_loss" in metrics:
            parts.append(f"validation loss {show_number(metrics['validation_loss'], '.4f')}")
        for name, loss in metrics.get("validation_sets", {}).items():
            parts.append(f"validation loss of {printable(name)} {show_number(loss, '.4f')}")
        if "validation_accuracy" in metrics:
            parts.append(show_accuracy(metrics))
        if metrics["skipped"]:
            parts.append("SKIPPED")
        return ", ".join([*parts, *filter(None, [self.remaining()])])

    def describe_mfu(self, metrics: dict[str, Any]) -> list[str]:
        """The model FLOPs utilization of a step, in a list that is empty if it means nothing.

        Above 100% the peak is wrong: it was measured at the start, in what other programs left of the machine.
        """
        if not self.shows_mfu:
            return []
        return [f"MFU {metrics['mfu']:.1%}" if metrics["mfu"] <= 1 else "MFU unknown: the peak was measured too low"]

    def draw(self, width: int = 80) -> Panel:
        """Draw the panel; a run without a step yet has only progress and checkpoint.

        On a terminal of WIDE columns with a second column: the curves of the last steps, and the newest events.
        """
        step = 0 if self.metrics is None else self.metrics["step"]
        bar = Table.grid(padding=(0, 1))
        bar.add_row(
            ProgressBar(
                total=max(1, self.last_step), completed=step, width=SPARKLINE_WIDTH, complete_style="green"
            ),  # not red, as by default: nothing is wrong
            self.place(step),
            self.remaining(),
        )
        rows: list[Any] = [bar]
        if self.metrics is not None:
            rows += self.draw_measures(self.metrics)
        rows.append(Text(self.elapsed() + self.describe_checkpoint()))
        shown: list[Any] = rows
        if width >= WIDE and self.metrics is not None:
            columns = Table.grid(padding=(0, 2))
            columns.add_column()
            columns.add_column(min_width=HISTORY_WIDTH)
            columns.add_row(Group(*rows), Group(*self.draw_history()))
            shown = [columns]
        colour = "green" if self.verdict == "well" else "yellow"
        for text, style in ((self.status, "bold"), (self.verdict, f"bold {colour}")):  # below, in the whole width
            if text:
                shown.append(Text(printable(text), style=style, no_wrap=False, overflow="fold"))
        return Panel(Group(*shown), title=escape(printable(self.name)), title_align="left", expand=False)

    def draw_history(self) -> list[Any]:
        """Draw the curves of the last steps with their lowest and highest values, and name the newest events."""
        rows: list[Any] = [Text(f"last {plural(max(map(len, self.curves.values())), 'step')}", style="dim")]
        for name, form in CURVES:
            values = self.curves[name]
            if values:
                ends = f"{format(min(values), form)} to {format(max(values), form)}"
                rows += [
                    Text(f"{name.replace('_', ' ')} {ends}"),
                    Text(draw_sparkline(values, self.bars, HISTORY_WIDTH), style="cyan"),
                ]
        return [*rows, *(Text(printable(event), overflow="ellipsis", no_wrap=True) for event in self.events)]

    def draw_measures(self, metrics: dict[str, Any]) -> list[Any]:
        """Draw loss curve, validation, gradients, pace, memory and, with MoE blocks, load of experts."""
        curve = Table.grid(padding=(0, 1))
        curve.add_row(
            Text(draw_sparkline(self.curves["loss"], self.bars), style="cyan"),
            f"loss {show_number(metrics['loss'], '.4f')}",
        )
        facts = Table.grid(padding=(0, 3))
        facts.add_row(
            f"validation {show_number(self.validation_loss, '.4f')}",
            f"grad norm {show_number(metrics['grad_norm'], '.3f')}",
            f"lr {metrics['lr']:.2e}",
        )
        facts.add_row(
            f"{metrics['tokens_per_second']:,.0f} tokens/s",
            *self.describe_mfu(metrics),
            f"{metrics['tokens']:,} tokens",
        )
        rows: list[Any] = [curve, facts]
        if metrics.get("memory_bytes") is not None:
            rows.append(Text(f"memory of rank 0, peak: {metrics['memory_bytes'] / 2**30:.2f} GiB"))
        if self.accuracy:
            rows.append(Text(self.accuracy))
        if metrics["expert_load"]:
            loads = "  ".join(f"{block}: {load:.2f}" for block, load in metrics["expert_load"].items())
            rows.append(
                Text(f"most loaded expert / mean by block  {loads}", style="dim", overflow="ellipsis", no_wrap=True)
            )
        return rows


def choose_bars(encoding: str) -> str:
    """The characters of a curve that an encoding has."""
    try:
        BARS.encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return PLAIN_BARS
    return BARS


def draw_sparkline(values: Sequence[float], bars: str = BARS, most: int = SPARKLINE_WIDTH) -> str:
    """Draw values as a row of bars: means of equal runs of values, scaled between the smallest and the largest mean."""
    if not values:
        return ""
    numbers = list(values)
    width = min(most, len(numbers))
    edges = [round(index * len(numbers) / width) for index in range(width + 1)]
    means = [sum(numbers[start:stop]) / (stop - start) for start, stop in pairwise(edges)]
    low, high = min(means), max(means)
    # A flat curve has no span; it is drawn as the lowest bars.
    span = (high - low) or 1.0
    return "".join(bars[min(len(bars) - 1, int((mean - low) / span * len(bars)))] for mean in means)


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


def show_clock(moment: float, now: float) -> str:
    """Format a moment by the clock here, with the weekday or date where it is not on the day of `now`."""
    there, here = time.localtime(moment), time.localtime(now)
    if there[:3] == here[:3]:
        return time.strftime("%H:%M", there)
    return time.strftime("%a %H:%M" if moment - now < 6 * 86400 else "%d %b %H:%M", there)


def since(moment: float) -> str:
    """Format the time since a moment, in seconds since the epoch; clocks of two machines may differ a little."""
    return format_duration(max(0.0, time.time() - moment))


def plural(number: int, noun: str) -> str:
    """Format a number of things: 1 rank, 2 ranks."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
