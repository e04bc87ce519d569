"""Numbers in words: short ones for ticks and boxes, rounded ones for tables, durations.

The colours of a report: light and dark for the page, light for pictures, and stand-ins for what follows the page.

Makes long series short for a page, without losing what a person looks for in them.

A spike of one step is the reason to open a report, so a mean over neighbours will not do: of each span of steps the first,
last, lowest and highest value are kept, at their own steps: what a line shows does not change as long as a span is at
most a pixel wide (M4, Jugel et al. 2014, PVLDB 7). Of a noisy series a span keeps its ends for the envelope and its mean for
smoothing. Maps keep means, since their cells stand for a span.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

LEAST_WINDOW = 15  # steps that a smoothed value is a mean of


def keep_extremes(steps: Sequence[int], values: Sequence[float], limit: int) -> tuple[list[int], list[float]]:
    """Reduce a series to at most `limit` of its points (4 at least): of equal spans the first, last, lowest and highest."""
    if len(values) <= limit:
        return list(steps), list(values)
    series = np.asarray(values, dtype=np.float64)
    edges = np.linspace(0, len(series), max(1, limit // 4) + 1).astype(int)
    kept: set[int] = set()
    for start, stop in pairwise(edges.tolist()):
        span = series[start:stop]
        kept |= {start, stop - 1, start + int(span.argmin()), start + int(span.argmax())}
    places = sorted(kept)
    return [int(steps[place]) for place in places], [float(values[place]) for place in places]


@dataclass(frozen=True)
class Columns:
    """A series in equal spans: mean, lowest and highest value of each, at the step that is furthest from the mean."""

    steps: tuple[int, ...]
    means: tuple[float, ...]
    lows: tuple[float, ...]
    highs: tuple[float, ...]


def make_columns(steps: Sequence[int], values: Sequence[float], limit: int) -> Columns:
    """Reduce a series to at most `limit` spans of as many values each; a shorter one keeps each value as a span."""
    found = np.asarray(values, dtype=np.float64)
    edges = np.linspace(0, len(found), min(limit, len(found)) + 1).astype(int)
    starts = edges[:-1]
    if not len(starts):
        return Columns((), (), (), ())
    means = np.add.reduceat(found, starts) / np.diff(edges)
    furthest = [
        start + int(np.abs(found[start:stop] - mean).argmax()) for start, stop, mean in zip(starts, edges[1:], means)
    ]
    furthest[0], furthest[-1] = 0, len(found) - 1  # a curve is as long as its run
    lows, highs = np.minimum.reduceat(found, starts), np.maximum.reduceat(found, starts)
    return Columns(
        tuple(int(steps[place]) for place in furthest),
        tuple(means.tolist()),
        tuple(lows.tolist()),
        tuple(highs.tolist()),
    )


def mean_of_spans(steps: Sequence[int], values: Sequence[float], edges: Sequence[float]) -> list[float | None]:
    """Average a series over the spans between `edges` of steps; None if a span has no value."""
    places = np.searchsorted(np.asarray(edges), np.asarray(steps), side="right") - 1
    inside = (places >= 0) & (places < len(edges) - 1)
    sums = np.bincount(places[inside], weights=np.asarray(values)[inside], minlength=len(edges) - 1)
    counts = np.bincount(places[inside], minlength=len(edges) - 1)
    return [float(total / number) if number else None for total, number in zip(sums, counts)]


def smooth(values: Sequence[float]) -> list[float]:
    """Smooth by the mean over a centred window of a hundredth of the run, at least LEAST_WINDOW values.

    It is as far on either side, so that a curve comes neither late nor early; at the ends it is shorter for that.
    """
    count = len(values)
    half = np.full(count, max(LEAST_WINDOW, count // 100) // 2)
    place = np.arange(count)
    half = np.minimum(half, np.minimum(place, count - 1 - place))
    sums = np.concatenate([[0.0], np.cumsum(np.asarray(values, dtype=np.float64))])
    means: list[float] = ((sums[place + half + 1] - sums[place - half]) / (2 * half + 1)).tolist()
    return means


@dataclass(frozen=True)
class Colours:
    """Colours of text next to plots (`ink`), of rules and grids (`line`), and of six series; #rrggbb each."""

    ink: str
    line: str
    series: tuple[str, str, str, str, str, str]

    def named(self) -> Iterator[tuple[str, str]]:
        """Yield the colours with the names that the page's style sheet gives them."""
        yield "muted", self.ink
        yield "line", self.line
        for number, colour in enumerate(self.series, start=1):
            yield f"series-{number}", colour

    def css(self) -> str:
        """Write the colours as variables of a style sheet."""
        return " ".join(f"--{name}: {colour};" for name, colour in self.named())


# Of Okabe and Ito (2008, "Color universal design"), in the order in which neighbours differ most; on a dark page too.
SERIES = ("#0072b2", "#d55e00", "#cc79a7", "#e69f00", "#009e73", "#56b4e9")
LIGHT = Colours("#5b6470", "#e3e6ea", SERIES)
DARK = Colours("#9aa3ae", "#2a3038", SERIES)

# matplotlib writes these, and the page's variables take their places, so that one SVG serves both themes.
THEMED = Colours("#010101", "#020202", ("#030301", "#030302", "#030303", "#030304", "#030305", "#030306"))


MAX_LISTED = 8


def short(value: float, _position: int | None = None, *, digits: int = 3) -> str:
    """Format a number for tick labels in three digits and a unit prefix: 12345 -> 12.3k."""
    return _scaled(value, "k", "M", "G", "T", digits=digits)


def distinct(values: Sequence[float]) -> list[str]:
    """Format tick labels in as many digits, three at least, as make no two of them the same."""
    for digits in range(3, 7):
        labels = [short(value, digits=digits) for value in values]
        if len(set(labels)) == len(set(values)):
            break
    return labels


def count(value: float) -> str:
    """Format a number of parameters or tokens in three digits and a unit: 1234567 -> 1.23M."""
    return _scaled(value, "k", "M", "B", "T")


def _scaled(value: float, *letters: str, digits: int = 3) -> str:
    """Format in this many digits and the letter of the largest power of a thousand below the value."""
    value = float(f"{value:.{digits}g}")  # first, or 999.9 of a unit would be 1e+03 of it
    for power in range(len(letters), 0, -1):
        if abs(value) >= 1000**power:
            return f"{value / 1000**power:.{digits}g}{letters[power - 1]}"
    return f"{value:.{digits}g}"


def perplexity(loss: float) -> str:
    """Format exp(loss); a loss beyond that of any vocabulary (30 nats) is not exponentiated."""
    return f"{math.exp(loss):,.1f}" if loss < 30 else "very large"


def duration(seconds: float) -> str:
    """Format seconds in the two largest units: 3725 -> 1 h 2 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def plain(value: object) -> str:
    """Format a logged value for a person: floats in four digits, lists up to MAX_LISTED items, nested names with values."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, dict):
        return ", ".join(f"{name}: {plain(item)}" for name, item in value.items())
    if isinstance(value, list):
        more = f" and {len(value) - MAX_LISTED:,} more" if len(value) > MAX_LISTED else ""
        shown = [f"({plain(item)})" if isinstance(item, dict | list) else plain(item) for item in value[:MAX_LISTED]]
        return (", ".join(shown) or "none") + more
    return str(value)
