"""Where the time of a run went, by the clock: which stretch of it was steps, saving, or lost by which cause.

The sums are goodput.py's; here the same times have their places, in COLUMNS columns from the begin of the first process to
the last sign of life. Lines of steps that were done again are gone from metrics.jsonl, so their stretch is what is left of
the time of the start that did them. Releases before wrote no time in lines: what is not known then is other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from amfm.pretrain.monitor.held import is_held, read_held
from amfm.pretrain.report.data import RunRecord, is_number
from amfm.pretrain.report.goodput import USES, Span, begin_of, discarded_between, find_spans, seconds_of
from amfm.pretrain.report.marks import Kind, kind_of

COLUMNS = 300
PLACES = 150  # of marks
Stretch = tuple[float, float, str]  # begin and end in seconds since 1970, and which of USES it was


@dataclass(frozen=True)
class Timeline:
    """Shares of each use in equal columns of the clock; uses that never were are left out. Marks have places from 0 to 1."""

    begin: float
    end: float
    columns: Mapping[str, Sequence[float]]
    marks: Sequence[tuple[float, Kind, str]]


def make_timeline(record: RunRecord) -> Timeline | None:
    """Place the uses of a run's time on the clock; None if no start with its time was recorded."""
    stretches = list(find_stretches(record))
    if not stretches:
        return None
    begin, end = min(each[0] for each in stretches), max(each[1] for each in stretches)
    width = (end - begin) / COLUMNS
    columns = {name: [0.0] * COLUMNS for name in USES}
    for first, last, use in stretches:
        low, high = (first - begin) / width, (last - begin) / width
        for column in range(int(low), min(COLUMNS, int(high) + 1)):
            columns[use][column] += max(0.0, min(high, column + 1) - max(low, column))
    marks: dict[tuple[int, Kind], dict[str, None]] = {}
    for event in record.events:
        kind = kind_of(event)
        if kind is not None and isinstance(event.get("time"), str):
            share = min(1.0, max(0.0, (seconds_of(event["time"]) - begin) / (end - begin)))
            marks.setdefault((int(PLACES * share), kind), {})[str(event["event"]).replace("_", " ")] = None
    placed = [(place / PLACES, kind, ", ".join(names)) for (place, kind), names in marks.items()]
    return Timeline(begin, end, {name: values for name, values in columns.items() if any(values)}, placed)


def find_stretches(record: RunRecord) -> Iterator[Stretch]:
    """Cut the time for which the run held its machines into stretches of one use each, none of which overlap."""
    spans = find_spans(record)
    if not spans or spans[-1].end <= spans[0].start:
        return
    launchers = read_held(record.directory)
    saved = {event.get("step") for event in record.events if event.get("event") == "checkpoint"}
    lines = [line for line in record.metrics if is_number(line.get("time")) and is_number(line.get("seconds"))]
    for number, span in enumerate(spans):
        ended = spans[number - 1].end if number else span.began
        failed = [(begin, begin + seconds) for begin, seconds in span.failed_starts()]
        yield from ((begin, end, "starting") for begin, end in failed)
        use = "waiting" if span.was_restarted() else "starting"
        is_kept = span.was_restarted() and not is_held(launchers, span.start)
        kept = [(ended, span.began)] if is_kept else launchers
        for begin, end in kept:
            yield from without(failed, max(begin, ended if number else begin), min(end, span.began), use)
        yield from filled(span.began, span.start, "starting")
        own = [line for line in lines if span.start - 1 <= line["time"] <= span.end + 1]
        following = spans[number + 1].events[0] if number + 1 < len(spans) else {}
        yield from stretches_of(span, own, saved, following)
    for begin, end in launchers:
        yield from filled(max(begin, spans[-1].end), end, "other")


def stretches_of(
    span: Span, lines: Sequence[Mapping[str, Any]], saved: set[Any], following: Mapping[str, Any]
) -> Iterator[Stretch]:
    """Cut one start, from its log on: steps, measuring, and what is between. following: the event of the next start."""
    usual = median(line["seconds"] for line in lines) if lines else 0.0
    place = span.start
    for number, line in enumerate(lines):
        begin = max(place, begin_of(line))
        before = "starting" if number == 0 else "saving" if lines[number - 1].get("step") in saved else "other"
        yield from between(place, begin, before, span.events[1:])
        warm = begin + (max(0.0, line["seconds"] - usual) if number == 0 else 0.0)
        stepped = min(max(begin + line["seconds"], warm), line["time"])
        yield from filled(begin, warm, "starting")
        yield from filled(warm, stepped, "steps")
        yield from filled(stepped, line["time"], "measuring")
        place = max(place, line["time"])
    rest = "starting" if not lines else "other"
    if lines and lines[-1].get("step") in saved and span.ended_in_order():
        rest = "saving"
    yield from between(place, max(place, span.end), rest, [*span.events[1:], following], until=math.inf)


def between(
    begin: float, end: float, use: str, events: Sequence[Mapping[str, Any]], until: float | None = None
) -> Iterator[Stretch]:
    """A stretch without lines: at its end the steps that were done again since, as events up to `until` (its end) count them."""
    again = discarded_between(events, begin, end if until is None else until)
    yield from filled(begin, max(begin, end - again), use)
    yield from filled(max(begin, end - again), end, "again")


def without(holes: Sequence[tuple[float, float]], begin: float, end: float, use: str) -> Iterator[Stretch]:
    """A stretch, less what is in holes."""
    for first, last in sorted(holes):
        if last > begin and first < end:
            yield from filled(begin, first, use)
            begin = last
    yield from filled(begin, end, use)


def filled(begin: float, end: float, use: str) -> Iterator[Stretch]:
    """A stretch, or none where it is empty."""
    if end > begin:
        yield begin, end, use
