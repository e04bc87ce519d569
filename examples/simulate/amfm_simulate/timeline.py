"""Traced ranks on a clock: what a step computes and sends, on streams, with the rates of the hardware file.

How it works: every rank has one stream that computes and one for each axis that sends, as process groups of NCCL have. An
operation takes the longer of its arithmetic and its bytes, a collective the seconds that the plan gives its bytes on the
declared links (`launch/plan/exchanges/seconds.py`). An exchange begins when its axis is free and what the rank computed before
it is done; where the trace waits for one, computing continues at its end. A receive ends when the send of the traced
rank that it belongs to has ended; of a rank that was not traced it is taken to be there in time. Weights that a step
gathers and the next one awaits are laid out at its beginning, as they are in every step but the first. The host is
left out.

`write_timeline` gives Chrome's trace event format, which Perfetto (https://ui.perfetto.dev) opens.

Chart of traced ranks: memory over the operations of a step, coloured by phase, and the streams of its timeline.
"""

from __future__ import annotations

import json
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from amfm.launch.plan.activations import storage_of
from amfm.launch.plan.estimate import Assumptions
from amfm.launch.plan.exchanges.seconds import PARTS, collective_seconds
from amfm.launch.plan.hardware import GIB, Hardware
from amfm.launch.plan.time import StepTime, estimate_step
from amfm_simulate.events import FLASH
from amfm_simulate.place import OUTSIDE
from amfm_simulate.trace import TracedRank, kind_of, pipeline_stage

SHARING_AXES = ("dp_cp", "expt_dp")  # of gradients and of ZeRO's weights
COMPUTE, HOST = "compute", "waits of the host"
MICROSECONDS = 1e6


@dataclass(frozen=True)
class Slice:
    """A piece of one stream of a rank, in seconds of the step; `details` are shown where it is clicked."""

    lane: str
    name: str
    start: float
    stop: float
    details: dict[str, Any]


@dataclass
class Timeline:
    """The step of one rank. `busy`: seconds of computing by kind of block; `waited`: of waiting, by axis."""

    entry: TracedRank
    seconds: float = 0.0
    slices: list[Slice] = field(default_factory=list)
    busy: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    waited: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))


class _Rank:
    """A rank on its way through its events."""

    def __init__(self, entry: TracedRank) -> None:
        self.line = Timeline(entry)
        self.events: list[dict[str, Any]] = entry.traced["events"]
        self.place = 0
        self.free: defaultdict[str, float] = defaultdict(float)  # when an axis can take the next exchange
        self.ends: dict[int, tuple[float, str]] = {}  # exchange -> its end, and its axis
        self.receives: dict[int, dict[str, Any]] = {}  # not yet known to have arrived


class _Cluster:
    """All traced ranks, with what is on its way between them in the order of sending."""

    def __init__(self, entries: Sequence[TracedRank], hardware: Hardware) -> None:
        self.hardware = hardware
        self.ranks = {entry.rank: _Rank(entry) for entry in entries}
        self.sent: dict[tuple[int, int], deque[float]] = defaultdict(deque)

    def run(self) -> list[Timeline]:
        """Advance ranks in turns, until none has anything left to do."""
        for rank in self.ranks.values():
            self._place_gathers(rank)
        is_moving = True
        while is_moving:
            is_moving = any([self._advance(number, rank) for number, rank in self.ranks.items()])
        for number, rank in self.ranks.items():
            assert rank.place == len(rank.events), f"rank {number} waits for a message that no rank sends"
        return [rank.line for rank in self.ranks.values()]

    def _place_gathers(self, rank: _Rank) -> None:
        """Give what this step only awaits the times of what it only starts: the step before has started the same."""
        started = [event for event in rank.events if "number" in event and event["do"] != "wait"]
        own = {event["number"] for event in started}
        awaited = {event["number"] for event in rank.events if event["do"] == "wait"}
        before, after = sorted(awaited - own), [event for event in started if event["number"] not in awaited]
        if len(before) == len(after):
            for number, event in zip(before, after):
                self._exchange(rank, {**event, "number": number}, 0.0)
            left = {event["number"] for event in after}
            rank.events = [event for event in rank.events if event["do"] == "wait" or event.get("number") not in left]

    def _advance(self, number: int, rank: _Rank) -> bool:
        """Take events of a rank until it waits for a send that has no time yet; whether there was any."""
        first = rank.place
        while rank.place < len(rank.events):
            event = rank.events[rank.place]
            if event["do"] == "compute":
                self._compute(rank, event)
            elif event["do"] == "wait":
                if not self._wait(number, rank, event["number"]):
                    break
            elif event["do"] == "host":
                rank.line.slices.append(Slice(HOST, event["what"], rank.line.seconds, rank.line.seconds, {}))
            elif event["do"] == "receive" and event["peer"] in self.ranks:
                rank.receives[event["number"]] = event | {"posted": rank.line.seconds}
            else:
                end = self._exchange(rank, event, rank.line.seconds)
                if event["do"] == "send":
                    self.sent[number, event["peer"]].append(end)
            rank.place += 1
        return rank.place > first

    def _compute(self, rank: _Rank, event: dict[str, Any]) -> None:
        """Put an operation on the stream that computes."""
        start = rank.line.seconds
        rank.line.seconds += compute_seconds(event, self.hardware, rank.line.entry.config.train.precision)
        kind = kind_of(event["kind"])
        rank.line.busy[kind] += rank.line.seconds - start
        details = {name: event[name] for name in ("phase", "flops", "bytes", "limit")}
        rank.line.slices.append(Slice(COMPUTE, f"{kind}: {event['name']}", start, rank.line.seconds, details))

    def _exchange(self, rank: _Rank, event: dict[str, Any], now: float) -> float:
        """Put an exchange on the stream of its axis; its end."""
        what = event.get("collective", event["do"])
        lane = event["axis"] if what not in ("send", "receive") else f"{event['axis']} {what}"
        seconds = collective_seconds(
            "send" if what == "receive" else what, event["bytes"], event["ranks"], event["stride"], self.hardware
        )
        start = max(now, rank.free[lane])
        rank.free[lane] = start + seconds
        rank.ends[event["number"]] = start + seconds, event["axis"]
        details = {"bytes": event["bytes"], "ranks": event["ranks"]}
        rank.line.slices.append(Slice(lane, what, start, start + seconds, details))
        return start + seconds

    def _wait(self, number: int, rank: _Rank, exchange: int) -> bool:
        """Wait for an exchange; False where it is a receive whose send has no time yet."""
        received = rank.receives.get(exchange)
        if received is not None:
            # Receives from one rank arrive in the order in which they were posted.
            earlier = [entry for entry in rank.receives.values() if entry["peer"] == received["peer"]]
            for entry in earlier[: earlier.index(received) + 1]:
                way = self.sent[entry["peer"], number]
                if not way:
                    return False
                end = max(entry["posted"], way.popleft())
                rank.ends[entry["number"]] = end, entry["axis"]
                details = {"bytes": entry["bytes"], "from rank": entry["peer"]}
                # A separate stream for each sender: what was posted at once is shown one after the other.
                lane = f"{entry['axis']} receive from rank {entry['peer']}"
                start = max(entry["posted"], rank.free[lane])
                rank.line.slices.append(Slice(lane, "receive", start, end, details))
                rank.free[lane] = end
                del rank.receives[entry["number"]]
        end, axis = rank.ends.get(exchange, (0.0, "other"))
        if end > rank.line.seconds:
            rank.line.waited[axis] += end - rank.line.seconds
            rank.line.seconds = end
        return True


def lay_out(entries: Sequence[TracedRank], hardware: Hardware) -> list[Timeline]:
    """Lay the traced step of each rank out in time; the ranks were traced with events."""
    return _Cluster(entries, hardware).run()


def compute_seconds(event: dict[str, Any], hardware: Hardware, precision: str) -> float:
    """Seconds of an operation by the plan's clock."""
    # Kernels take float32 states and sums next to products in the run's precision; torch's products give what they
    # take.
    wide = event["wide"] and event["name"].startswith("aten.")
    return hardware.operation_seconds(
        event["flops"],
        event["bytes"],
        "float32" if wide else precision,
        event["limit"],
        backward=event["phase"] == "backward",
        by_flash=FLASH in event["name"],
    )


def planned_step(entry: TracedRank, hardware: Hardware, assumptions: Assumptions) -> StepTime:
    """The plan's step of this rank's pipeline stage, with as many micro-batches as were traced."""
    layout = entry.layout
    return estimate_step(
        entry.config,
        layout,
        hardware,
        storage_of(entry.config),
        overlap=assumptions.overlap,
        imbalance=assumptions.imbalance,
        stage=pipeline_stage(entry.config, layout.ranks, entry.rank),
    )


def compare_seconds(line: Timeline, planned: StepTime) -> dict[str, tuple[float, float]]:
    """Seconds of a step by part, from the plan and from the timeline; each column adds up to its step."""
    found: dict[str, tuple[float, float]] = {}
    for kind in dict.fromkeys([*planned.compute, *line.busy]):
        if kind != OUTSIDE:
            found[kind] = planned.compute.get(kind, 0.0), line.busy[kind]
    found["optimizer and gradient accumulation"] = planned.optimizer, line.busy[OUTSIDE]
    waited = defaultdict(float, line.waited)
    for part in dict.fromkeys(PARTS.values()):
        own = sum(waited.pop(axis, 0.0) for axis, name in PARTS.items() if name == part)
        said = planned.communication.get(part, 0.0) + (planned.bubble if part == "pipeline" else 0.0)
        found["waits for the pipeline" if part == "pipeline" else f"waits for the {part} axis"] = said, own
    shared = sum(waited.pop(axis, 0.0) for axis in SHARING_AXES)
    found["waits for gradients and weights"] = planned.reduction + planned.exposed_gathers, shared
    found["waits for what all ranks agree on"] = 0.0, sum(waited.values())
    found["host, multiprocessors, jitter"] = planned.host + planned.shared + planned.jitter, 0.0
    return {name: both for name, both in found.items() if any(both)} | {"all": (planned.total(), line.seconds)}


def write_timeline(timelines: Sequence[Timeline], path: Path) -> None:
    """Write Chrome trace events: a process for each rank, a thread for each of its streams. Times are microseconds."""
    events: list[dict[str, Any]] = []
    for line in timelines:
        rank, stage = line.entry.rank, pipeline_stage(line.entry.config, line.entry.layout.ranks, line.entry.rank)
        lanes = [COMPUTE, *sorted({entry.lane for entry in line.slices} - {COMPUTE})]
        name = f"rank {rank}" + (f", pipeline stage {stage}" if line.entry.layout.pipeline > 1 else "")
        events.append({"ph": "M", "name": "process_name", "pid": rank, "args": {"name": name}})
        for number, lane in enumerate(lanes):
            events.append({"ph": "M", "name": "thread_name", "pid": rank, "tid": number, "args": {"name": lane}})
            events.append(
                {"ph": "M", "name": "thread_sort_index", "pid": rank, "tid": number, "args": {"sort_index": number}}
            )
        for entry in sorted(line.slices, key=lambda item: item.start):
            found = {"name": entry.name, "pid": rank, "tid": lanes.index(entry.lane), "ts": entry.start * MICROSECONDS}
            shape = (
                {"ph": "i", "s": "t"}
                if entry.lane == HOST
                else {"ph": "X", "dur": (entry.stop - entry.start) * MICROSECONDS}
            )
            events.append(found | shape | {"args": entry.details})
    path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}), encoding="utf-8")


COLOURS = {"forward": "C0", "backward": "C1", "reduction": "C2", "optimizer": "C3"}


def draw_trace(ranks: Sequence[TracedRank], timelines: Sequence[Timeline], path: Path) -> None:
    """Write the chart to `path`: a panel per rank, and one per timeline; the suffix chooses the format."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = len(ranks) + len(timelines)
    figure = Figure(figsize=(11, 3.5 * panels), layout="constrained")
    FigureCanvasAgg(figure)
    column = figure.subplots(panels, 1, squeeze=False)[:, 0]
    for axes, entry in zip(column, ranks):
        draw_memory_curve(axes, entry)
    for axes, line in zip(column[len(ranks) :], timelines):
        draw_streams(axes, line)
    figure.savefig(path)


def draw_streams(axes: Any, line: Timeline) -> None:
    """Draw what each stream of a rank does over the milliseconds of the step: computing by kind of block, exchanges by axis."""
    bars: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
    for piece in line.slices:
        if piece.lane != HOST:
            what = piece.name.partition(":")[0] if piece.lane == COMPUTE else "exchanges"
            bars[piece.lane, what].append((1e3 * piece.start, 1e3 * (piece.stop - piece.start)))
    lanes = [COMPUTE, *sorted({lane for lane, _ in bars} - {COMPUTE})]
    kinds = dict.fromkeys(what for _, what in bars)
    colours = {what: f"C{number}" for number, what in enumerate(kinds)}
    for (lane, what), spans in bars.items():
        axes.broken_barh(spans, (lanes.index(lane) - 0.4, 0.8), facecolors=colours[what], rasterized=True)
    for what, colour in colours.items():
        axes.bar(0, 0, color=colour, label=what)
    axes.set_yticks(range(len(lanes)), lanes)
    axes.invert_yaxis()
    axes.set_xlim(0, 1e3 * line.seconds)
    axes.set_xlabel("ms of the step, without host and launches")
    axes.set_title(f"streams of rank {line.entry.rank}", loc="left")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)


def draw_memory_curve(axes: Any, entry: TracedRank) -> None:
    """Draw bytes held after each larger allocation of the second step, in GiB, and the planned peak."""
    curve = entry.traced["curve"]
    first = curve[0][0]
    places, sizes = [point[0] - first for point in curve], [point[1] / GIB for point in curve]
    axes.plot(places, sizes, color="black", linewidth=0.6)
    for phase, colour in COLOURS.items():
        inside = [point[2] == phase for point in curve]
        axes.fill_between(places, sizes, where=inside, step="post", color=colour, alpha=0.5, label=phase)
    peak = entry.predicted.total() / GIB
    axes.axhline(peak, color="black", linestyle="--", label=f"planned peak, {peak:,.2f} GiB")
    axes.set_ylim(bottom=0)
    axes.set_ylabel("GiB")
    axes.set_xlabel("operations of the step")
    axes.set_title(f"rank {entry.rank}, {entry.layout.describe()}: traced peak {entry.peak_bytes / GIB:,.2f} GiB")
    axes.legend(bbox_to_anchor=(1.0, 1.0), loc="upper left")
