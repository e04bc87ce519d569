"""What a plot is: curves over steps or a map, the ends of its axes, how curves differ, and marks of what happened to the run.

A `Plot` draws nothing. The page's script (page.js) draws it where a reader can point and zoom, and matplotlib (draw.py)
for pictures and for readers whose browser runs no script; so both show the same curves.

Marks are by kind, and a long run may have skipped thousands of steps: marks of one kind in the same of SPANS spans of its steps
are one with a count. The page gathers further, as far as its pixels go.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from amfm.pretrain.report.data import RunRecord
from amfm.pretrain.report.numbers import smooth

Kind = Literal["failure", "trouble", "other"]
SPANS = 600
FAILURES = {"failed", "gave_up", "tensorboard_failed", "tasks_failed"}
TROUBLE = {
    "skipped_step",
    "spike",
    "rolled_back",
    "rolled_back_to",
    "experts_collapsed",
    "unbalanced_experts",
    "stragglers",
}
# Of every run: what would cover the others.
QUIET = {"checkpoint", "validation", "tasks", "replicas", "resume", "initial_weights", "distill", "pattern", "low_precision", "end", "stage"}  # fmt: skip
MAX_COLUMNS, LEAST_COLUMNS, MAX_CELLS = 240, 60, 6000  # of a map, and its cells
MIN_SMOOTHED = 20
NUM_COLOURS, NUM_DASHES = 6, 3
MIN_USUAL = 500  # values of a curve whose axis leaves out what is unusual
BEGIN, UNUSUAL = 0.05, 0.005  # shares of a run's steps: its first ones, and on either side of the others


@dataclass(frozen=True)
class Mark:
    """Events of one kind at or near a step: how many, and what they were."""

    step: int
    kind: Kind
    number: int
    text: str


@dataclass(frozen=True)
class Stage:
    """A training stage as plots shade it; last: of its steps."""

    name: str
    first: int
    last: int


def kind_of(event: Mapping[str, Any]) -> Kind | None:
    """Which kind of mark an event is; None for one of every run."""
    name = str(event.get("event"))
    if name in QUIET:
        return None
    return "failure" if name in FAILURES else "trouble" if name in TROUBLE else "other"


def make_marks(record: RunRecord) -> tuple[Mark, ...]:
    """Collect what happened to a run while it did the steps that are logged: all events but those of a quiet run."""
    first, last = int(record.metrics[0]["step"]), record.last_step()
    gathered: dict[tuple[Kind, int], list[tuple[int, str]]] = {}
    for event in record.events:
        name, step, kind = str(event.get("event")), event.get("step"), kind_of(event)
        if not isinstance(step, int) or not first <= step <= last or kind is None:
            continue
        span = (step - first) * SPANS // max(SPANS, last - first + 1)
        gathered.setdefault((kind, span), []).append((step, name.replace("_", " ")))
    return tuple(
        Mark(found[0][0], kind, len(found), ", ".join(dict.fromkeys(name for _, name in found)))
        for (kind, _), found in sorted(gathered.items(), key=lambda item: item[1][0])
    )


def make_stages(record: RunRecord) -> tuple[Stage, ...]:
    """List the stages that the run has come to; none for a run of one stage."""
    if not record.config.stages:
        return ()
    ends = [stage.last_step for stage in record.stages]
    firsts = [1, *(end + 1 for end in ends[:-1])]
    return tuple(
        Stage(stage.name, first, min(end, record.last_step()))
        for stage, first, end in zip(record.stages, firsts, ends)
        if first <= record.last_step()
    )


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
