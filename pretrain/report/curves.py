"""What a plot is: curves over steps or a map, the ends of its axes, and how curves differ from each other.

A `Plot` draws nothing. The page's script (page.js) draws it where a reader can point and zoom, and matplotlib (draw.py)
for pictures and for readers whose browser runs no script; so both show the same curves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from amfm.pretrain.report.marks import Mark, Stage
from amfm.pretrain.report.numbers import smooth

MAX_COLUMNS, LEAST_COLUMNS, MAX_CELLS = 240, 60, 6000  # of a map, and its cells
MIN_SMOOTHED = 20
NUM_COLOURS, NUM_DASHES = 6, 3
MIN_USUAL = 500  # values of a curve whose axis leaves out what is unusual
BEGIN, UNUSUAL = 0.05, 0.005  # shares of a run's steps: its first ones, and on either side of the others


@dataclass(frozen=True)
class Curve:
    """One line: values at steps, a name for the legend (empty: none), and its colour and dashes by number, from 0.

    `noisy`: drawn smoothed; with `has_envelope` above the lowest and highest values. `dots`: few points, each marked. `run`:
    number of the run on a page of several.
    """

    name: str
    steps: Sequence[int]
    values: Sequence[float]
    series: int = 0
    dash: int = 0
    noisy: bool = False
    has_envelope: bool = False
    dots: bool = False
    run: int = 0


@dataclass(frozen=True)
class HeatMap:
    """Values [row][span] of named rows over spans of steps between `edges`; None if nothing was measured.

    `lowest`, `highest`: values of the first and the last colour; with `is_log` colours follow the ratio to `lowest`.
    """

    names: tuple[str, ...]
    edges: tuple[float, ...]
    rows: tuple[tuple[float | None, ...], ...]
    lowest: float
    highest: float
    is_log: bool = False


@dataclass(frozen=True)
class Plot:
    """A figure: title, one line on what to see in it, the unit of its values, and curves or a map.

    `lowest` and `highest` fix an end of the vertical axis; `limit` is a dashed line across. `usual`: where the axis ends until a
    reader asks for all values. `marks`: what happened that a curve may show. `stages`: of a run that has several.
    `is_folded`: shown to those who ask for it.
    """

    name: str
    title: str
    caption: str
    unit: str
    curves: tuple[Curve, ...] = ()
    is_log: bool = False
    lowest: float | None = None
    highest: float | None = None
    limit: float | None = None
    heat: HeatMap | None = None
    usual: tuple[float, float] | None = None
    marks: tuple[Mark, ...] = ()
    stages: tuple[Stage, ...] = ()
    is_folded: bool = False


def usual_range(curves: Sequence[Curve]) -> tuple[float, float] | None:
    """Choose the ends of an axis that the begin of a run and spikes would rule; None: all fit well, or the run is short.

    It shows what is smoothed after the first BEGIN of the steps, and all but UNUSUAL of the lowest and highest values.
    """
    if max((len(curve.values) for curve in curves), default=0) < MIN_USUAL:
        return None
    first, last = min(curve.steps[0] for curve in curves), max(curve.steps[-1] for curve in curves)
    ends: list[float] = []
    whole: list[float] = []
    for curve in curves:
        values = np.asarray(curve.values, dtype=np.float64)
        late = values[np.searchsorted(curve.steps, first + BEGIN * (last - first)) :]
        whole += [values.min(), values.max()]
        if not len(late):
            continue
        if curve.noisy:
            smoothed = smooth(late.tolist())
            ends += [min(smoothed), max(smoothed)]
        ends += np.quantile(late, [UNUSUAL, 1 - UNUSUAL]).tolist() if curve.noisy else [late.min(), late.max()]
    room = 0.05 * (max(ends) - min(ends))
    if room == 0 or max(whole) - min(whole) < 2 * (max(ends) - min(ends)):
        return None
    return float(min(ends) - room), float(max(ends) + room)


def cap_outliers(values: Sequence[float]) -> tuple[float | None, str]:
    """Choose where an axis ends that a few spikes would rule, and say in words how many are above; None: all fit.

    A spike is above twice the value that 95 of 100 stay below: a first step that compiled, a step after a pause of the host.
    """
    if len(values) < MIN_SMOOTHED:
        return None, ""
    usual = float(np.quantile(np.asarray(values, dtype=np.float64), 0.95))
    top = 1.25 * usual
    above = sum(value > top for value in values)
    if usual <= 0 or max(values) <= 2 * usual:
        return None, ""
    return top, f" {above} of {len(values):,} steps are above the axis."


def curve_style(number: int) -> tuple[int, int]:
    """Colour and dashes of one curve of several: neighbours differ in both, and the first 18 in one of them."""
    return number % NUM_COLOURS, (number + number // NUM_COLOURS) % NUM_DASHES


def noisy_curve(steps: Sequence[int], values: Sequence[float], name: str = "", *, series: int) -> Curve:
    """Make the curve of a noisy measure: smoothed above its envelope; of few steps as it is."""
    is_noisy = len(values) > MIN_SMOOTHED
    return Curve(name, steps, values, series, noisy=is_noisy, has_envelope=is_noisy)


def most_columns(rows: int) -> int:
    """Columns that a map of so many rows has at most, so that its cells stay few."""
    return max(LEAST_COLUMNS, min(MAX_COLUMNS, MAX_CELLS // rows))
