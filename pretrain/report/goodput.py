"""Where the time of a run went, as sums and by the clock: steps that count, measuring, saving, and what was lost by which cause.

Counted is the time for which the run held its machines: from the begin of a process until its last sign of life, and all
the time for which a launcher lived (monitor/held.py). What passed between two commands by hand, or in the queue, is not, and
shown as `away`. Releases before wrote less: then starts count from their event, restarts of a launcher with all the time since
the last sign of life, and the rest as other.

A `Timeline` has the same times at their places, in COLUMNS columns from the begin of the first process to the last sign of
life. Lines of steps that were done again are gone from metrics.jsonl, so their stretch is what is left of the time of the start
that did them. Releases before wrote no time in lines: what is not known then is other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from itertools import pairwise
from statistics import median
from typing import Any

from amfm.pretrain.launcher_protocol import IN_ORDER
from amfm.pretrain.monitor.held import is_held, overlap, read_held
from amfm.pretrain.report.curves import Kind, kind_of
from amfm.pretrain.report.data import RunRecord, is_number

# Words for the uses of `TimeUse`, in the order of its fields.
USES = {
    "steps": "steps that count",
    "measuring": "validation and tasks",
    "saving": "saving",
    "starting": "starting",
    "again": "steps done again",
    "waiting": "waiting for a restart",
    "other": "other",
}
ENDS = ("end", "signal", "failed", "gave_up")
MEASURED = ("validation_seconds", "tasks_seconds")
COLUMNS = 300
PLACES = 150  # of marks
Stretch = tuple[float, float, str]  # begin and end in seconds since 1970, and which of USES it was


@dataclass(frozen=True)
class TimeUse:
    """Seconds of a run by use, and how often it was started again after it failed.

    steps: that count, the first of each start as the others. measuring: validation and tasks. saving: what steps waited for. starting: from the begin of a process,
    its launcher's too, to its first step, failed starts included. again: steps that a resume or a rollback took away. waiting: for a
    restart. other: the rest, such as hooks, logs and the end of processes. away: between commands, when no machine was held.
    """

    steps: float = 0.0
    measuring: float = 0.0
    saving: float = 0.0
    starting: float = 0.0
    again: float = 0.0
    waiting: float = 0.0
    other: float = 0.0
    away: float = 0.0
    restarts: int = 0

    def parts(self) -> dict[str, float]:
        """Seconds of the time that was held, by use, in the order of the fields."""
        return {name: value for name, value in asdict(self).items() if name not in ("away", "restarts")}

    def held(self) -> float:
        """Seconds for which machines were held."""
        return sum(self.parts().values())

    def share(self) -> float:
        """Which part of the time trained what counts."""
        return self.steps / self.held()


@dataclass(frozen=True)
class Span:
    """One start: its events, from its own one to the last before the next start, with their times; and its last sign of life."""

    events: Sequence[Mapping[str, Any]]
    end: float

    @property
    def start(self) -> float:
        """When its log began."""
        return seconds_of(self.events[0]["time"])

    @property
    def began(self) -> float:
        """When its process began."""
        return min(self.start, moment(self.events[0].get("began_at"), self.start))

    def failed_starts(self) -> list[tuple[float, float]]:
        """Begin and seconds of the starts before it that came to no log."""
        found = self.events[0].get("failed_starts") or []
        return [(moment(each.get("began_at"), self.began), float(each.get("seconds") or 0.0)) for each in found]

    def was_restarted(self) -> bool:
        """Whether a launcher started it, after a failure, while it held the machines."""
        return any(event.get("event") == "restarted" for event in self.events)

    def ended_in_order(self) -> bool:
        """Whether it ended as it was asked to."""
        return any(event.get("event") in IN_ORDER for event in self.events)


def measure_goodput(record: RunRecord) -> TimeUse | None:
    """Measure where the time went, from events and metrics; None if no start with its time was recorded, or a log has a gap."""
    if record.gap is not None:
        return None
    spans = find_spans(record)
    if not spans or spans[-1].end <= spans[0].start:
        return None
    steps = record.seconds()
    measuring = sum(sum(record.series(name)[1]) for name in MEASURED)
    starting, waiting, away, restarts = 0.0, 0.0, 0.0, 0
    launchers = read_held(record.directory)
    tail = overlap(launchers, spans[-1].end, math.inf)
    held = sum(span.end - span.began for span in spans) + tail
    for before, span in zip([None, *spans], spans):
        failed = span.failed_starts()
        spent = sum(seconds for _, seconds in failed)
        starting += span.start - span.began + spent
        restarts += len(failed)
        last_sign = 0.0 if before is None else before.end
        kept = max(0.0, overlap(launchers, last_sign, span.began) - spent)
        if before is not None:
            gap = max(0.0, span.began - before.end - spent)
            restarts += not before.ended_in_order()
            if span.was_restarted() and not is_held(launchers, span.start):  # as torchrun does, and releases before
                kept = gap
            away += gap - kept
        if span.was_restarted():
            waiting += kept
        else:
            starting += kept
        held += spent + kept
    again = count_discarded(record.events)
    pauses, before_first, in_first = measure_pauses(record, spans)
    steps, warm_up = steps - in_first, before_first + in_first
    known = steps + measuring + starting + waiting + again + pauses + warm_up
    return TimeUse(
        steps=steps,
        measuring=measuring,
        saving=pauses,
        starting=starting + warm_up,
        again=again,
        waiting=waiting,
        other=max(0.0, held - known),
        away=away,
        restarts=restarts,
    )


def find_spans(record: RunRecord) -> list[Span]:
    """Cut the events of a run at its starts."""
    timed = [event for event in record.events if isinstance(event.get("time"), str)]
    begins = [place for place, event in enumerate(timed) if event.get("event") == "start"]
    spans = []
    for begin, after in zip(begins, [*begins[1:], len(timed)]):
        events = timed[begin:after]
        signs = [
            seconds_of(event["time"])
            for event in events
            if event.get("event") not in ("rolled_back_to", "rolled_forward")
        ]
        # Steps write no events: the newest line of metrics, which the next start or a rollback saw, may be younger.
        seen = [*events[1:], *timed[after : after + 1]]
        signs += [event["last_line_at"] for event in seen if is_number(event.get("last_line_at"))]
        if after == len(timed):
            line = record.metrics[-1]
            is_open = not any(event.get("event") in ENDS for event in events)
            if is_number(line.get("time")):
                signs.append(float(line["time"]))
            elif is_open:
                signs.append((record.directory / "metrics.jsonl").stat().st_mtime)
        limit = (
            moment(timed[after].get("began_at"), seconds_of(timed[after]["time"])) if after < len(timed) else max(signs)
        )
        spans.append(Span(events, max(signs[0], min(limit, max(signs)))))
    return spans


def count_discarded(events: Sequence[Mapping[str, Any]]) -> float:
    """Seconds of steps that resumes and rollbacks took away, less what was brought back."""
    by_rollback: dict[Any, float] = {}
    total = 0.0
    for event in events:
        spent = event.get("discarded_seconds")
        seconds = float(spent) if isinstance(spent, int | float) and is_number(spent) else 0.0
        if event.get("event") == "rolled_back_to":
            by_rollback[event.get("number")] = seconds
        if event.get("event") == "rolled_forward":
            seconds = -by_rollback.pop(event.get("number"), 0.0)
        total += seconds
    return total


def discarded_between(events: Sequence[Mapping[str, Any]], begin: float, end: float) -> float:
    """Seconds that events after one moment, and up to another, took away."""
    return count_discarded([event for event in events if begin < moment(event.get("time"), begin) <= end])


def measure_pauses(record: RunRecord, spans: Sequence[Span]) -> tuple[float, float, float]:
    """Seconds that saving took between steps and at the ends, those before the first step of each start, and those in it.

    In it are those beyond the start's usual step: memory is allocated, kernels are loaded, graphs are recorded.
    """
    saved = {event.get("step") for event in record.events if event.get("event") == "checkpoint"}
    lines = [line for line in record.metrics if is_number(line.get("time")) and is_number(line.get("seconds"))]
    saving = warm_up = in_first = 0.0
    for span in spans:
        own = [line for line in lines if span.start - 1 <= line["time"] <= span.end + 1]
        if not own:
            continue
        warm_up += max(0.0, begin_of(own[0]) - span.start)
        in_first += max(0.0, own[0]["seconds"] - median(line["seconds"] for line in own))
        for line, following in pairwise(own):
            begin, end = line["time"], begin_of(following)
            again = discarded_between(span.events[1:], begin, end)  # which has its own place
            saving += max(0.0, end - begin - again) * (line.get("step") in saved)
        if own[-1].get("step") in saved and span.ended_in_order():
            saving += max(0.0, span.end - own[-1]["time"])
    return saving, warm_up, in_first


def begin_of(line: Mapping[str, Any]) -> float:
    """When the step of a line began."""
    measured = sum(line[name] for name in MEASURED if is_number(line.get(name)))
    return float(line["time"]) - float(line["seconds"]) - float(measured)


def moment(value: object, default: float) -> float:
    """Seconds since 1970 of a time in ISO 8601, the default if there is none."""
    return seconds_of(value) if isinstance(value, str) else default


def seconds_of(time: str) -> float:
    """Seconds since 1970 of a time in ISO 8601."""
    return datetime.fromisoformat(time).timestamp()


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
