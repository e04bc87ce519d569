"""Makes long series short for a page, without losing what a person looks for in them.

A spike of one step is the reason to open a report, so a mean over neighbours won't do: of each span of steps the first,
last, lowest and highest value are kept, at their own steps: what a line shows does not change as long as a span is at
most a pixel wide (M4, Jugel et al. 2014, PVLDB 7). Maps keep means, since their cells stand for a span.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np


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


def mean_of_spans(steps: Sequence[int], values: Sequence[float], edges: Sequence[float]) -> list[float | None]:
    """Average a series over the spans between `edges` of steps; None where a span has no value."""
    places = np.searchsorted(np.asarray(edges), np.asarray(steps), side="right") - 1
    inside = (places >= 0) & (places < len(edges) - 1)
    sums = np.bincount(places[inside], weights=np.asarray(values)[inside], minlength=len(edges) - 1)
    counts = np.bincount(places[inside], minlength=len(edges) - 1)
    return [float(total / number) if number else None for total, number in zip(sums, counts)]


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
