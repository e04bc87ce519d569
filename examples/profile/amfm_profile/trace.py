"""Tables of a traced step: by kind of work, by kind of block, and the operations that took longest.

Read a trace of one step and put each operation's time to a kind of work and a part of the model.

How it works: events of a thread are nested by their times, so each has a stack of others around it, and its own time is
what its children leave. The stack says where it belongs: inside the engine of backward passes it is backward work, of the
block whose forward operation has the same sequence number (recomputation where a block's range is open too); inside a
block's range it is that block's forward pass; else the phase of the step decides. With a GPU the kernels count, each put
where the operation is that launched it, and the host's own time is left out: it runs ahead of the GPU.
"""

from __future__ import annotations

import gzip
import json
import re
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from amfm.data_pipeline.durable.json_files import take, understood
from amfm.data_pipeline.terminal import format_bytes
from amfm.model.config.kinds import describe_symbol
from amfm.pretrain.config.train_and_launch import PREFIX
from amfm.pretrain.report.data import read_run

BACKWARD = "autograd::engine::evaluate_function: "
COMMUNICATION = ("c10d::", "gloo:", "nccl:", "record_param_comms", "ncclDevKernel", "ncclKernel")
HOST = {"cpu_op", "user_annotation"}
DEVICE = {"kernel", "gpu_memcpy", "gpu_memset"}
HEAD = "head and loss"
BETWEEN = "between operations"


@dataclass(eq=False)
class Event:
    """An event of a trace; times in microseconds. own: its duration without its children's. stack: around it, outermost first."""

    name: str
    category: str
    start: float
    duration: float
    args: Mapping[str, Any]
    stack: tuple[Event, ...] = ()
    own: float = 0.0

    @property
    def end(self) -> float:
        """When it ends."""
        return self.start + self.duration


@dataclass(frozen=True)
class Share:
    """Where an operation belongs: kind of work (forward, backward, recompute, communication, a phase), part of the model."""

    kind: str
    part: str


@dataclass
class StepTrace:
    """One traced step: its length, time by kind and part, and by operation, all in microseconds.

    on_device: the times are those of kernels; busy is then the time in which any ran. peak_bytes: most memory that was
    allocated, where the trace has allocations.
    """

    step: int
    duration: float
    on_device: bool
    busy: float = 0.0
    shares: dict[Share, float] = field(default_factory=dict)
    operations: dict[tuple[str, str], tuple[float, int]] = field(default_factory=dict)
    peak_bytes: int | None = None

    def add(self, share: Share, name: str, time: float) -> None:
        """Add an operation's time."""
        self.shares[share] = self.shares.get(share, 0.0) + time
        before, calls = self.operations.get((name, share.kind), (0.0, 0))
        self.operations[name, share.kind] = before + time, calls + 1


def read_trace(path: Path) -> StepTrace:
    """Read a trace file. Raises ValueError for one that `train.profile` did not write, or that was cut."""
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            document = json.load(file)
    except (OSError, EOFError, ValueError) as error:
        raise ValueError(f"{path} is not a whole trace ({error}); trace a step again") from error
    with understood(path):
        records = take(document, "traceEvents", list, path)
        whole = [record for record in records if record.get("ph") == "X"]
        host, device = _host_events(whole), _events(whole, DEVICE)
    root = next((event for event in host if event.name.startswith(f"{PREFIX}step ")), None)
    if root is None:
        raise ValueError(f"{path} has no step of amfm in it; name a file that train.profile wrote")
    inside = [event for event in host if root in event.stack]
    trace = StepTrace(int(root.name.split()[-1]), root.duration, bool(device), peak_bytes=_find_peak(records))
    shares = dict(zip(map(id, inside), _place(inside)))
    if device:
        trace.busy = _union(device)
        launched = {event.args.get("External id"): event for event in inside if event.category == "cpu_op"}
        for kernel in device:
            parent = launched.get(kernel.args.get("External id"))
            share = shares[id(parent)] if parent is not None else Share("other", "-")
            if kernel.name.startswith(COMMUNICATION):
                share = Share("communication", share.part)
            trace.add(share, kernel.name, kernel.duration)
        return trace
    trace.busy = root.duration
    for event in inside:
        trace.add(shares[id(event)], BETWEEN if event.category == "user_annotation" else event.name, event.own)
    trace.add(Share("other", "-"), BETWEEN, root.own)
    return trace


def _events(records: Iterable[Mapping[str, Any]], categories: set[str]) -> list[Event]:
    return [
        Event(str(r["name"]), str(r["cat"]), float(r["ts"]), float(r["dur"]), r.get("args") or {})
        for r in records
        if r.get("cat") in categories
    ]


def _host_events(records: Sequence[Mapping[str, Any]]) -> list[Event]:
    """Events of the host with stacks and own times, thread by thread; the step's range is around those of all threads."""
    by_thread: dict[Any, list[Mapping[str, Any]]] = {}
    for record in records:
        if record.get("cat") in HOST:
            by_thread.setdefault((record.get("pid"), record.get("tid")), []).append(record)
    threads = [
        sorted(_events(of_thread, HOST), key=lambda e: (e.start, -e.duration)) for of_thread in by_thread.values()
    ]
    roots = [event for thread in threads for event in thread if event.name.startswith(f"{PREFIX}step ")]
    for thread in threads:
        stack: list[Event] = []
        for event in thread:
            while stack and stack[-1].end <= event.start:
                stack.pop()
            event.own = event.duration
            if stack:
                stack[-1].own -= event.duration
                event.stack = (*stack[-1].stack, stack[-1])
            elif event not in roots:  # of another thread, such as the one of backward passes on a GPU
                event.stack = tuple(root for root in roots if root.start <= event.start <= root.end)
            stack.append(event)
    return [event for thread in threads for event in thread]


def _place(events: Sequence[Event]) -> Iterator[Share]:
    """The share of each event, in their order."""
    part_of_sequence: dict[Any, str] = {}
    for event in sorted(events, key=lambda e: e.start):
        if "Sequence number" in event.args and _backward_of(event) is None:
            part_of_sequence[event.args["Sequence number"]] = _part_of(event) or HEAD
    last_part = "-"
    for event in events:
        part, node = _part_of(event), _backward_of(event)
        if event.name.startswith(COMMUNICATION):
            yield Share("communication", part or "-")
        elif node is not None and part is not None:
            yield Share("recompute", part)
        elif node is not None:
            # Nodes that add up gradients have no number; they follow the node that gave the gradient.
            last_part = part_of_sequence.get(node.args.get("Sequence number"), last_part)
            yield Share("backward", last_part)
        elif part is not None:
            yield Share("forward", part)
        else:
            phase = _innermost(event, "phase ") or "other"
            is_work = event.category == "cpu_op" and phase == "forward"
            yield Share("forward", HEAD) if is_work else Share("other" if phase == "forward" else phase, "-")


def _around(event: Event) -> Iterator[Event]:
    """The event itself and those around it, innermost first."""
    yield event
    yield from reversed(event.stack)


def _innermost(event: Event, prefix: str) -> str | None:
    """Name, without prefixes, of the innermost range of ours that begins so."""
    start = f"{PREFIX}{prefix}"
    return next((e.name.removeprefix(start) for e in _around(event) if e.name.startswith(start)), None)


def _part_of(event: Event) -> str | None:
    """The part of the model whose range is open: `block 3 M` or `embedding`."""
    block = _innermost(event, "block ")
    if block is not None:
        return f"block {block}"
    return "embedding" if _innermost(event, "embedding") is not None else None


def _backward_of(event: Event) -> Event | None:
    """The node of the backward pass that the event belongs to."""
    return next((e for e in _around(event) if e.name.startswith(BACKWARD)), None)


def _union(events: Iterable[Event]) -> float:
    """Time in which any of the events continues."""
    total, reached = 0.0, float("-inf")
    for event in sorted(events, key=lambda e: e.start):
        total += max(0.0, event.end - max(event.start, reached))
        reached = max(reached, event.end)
    return total


def _find_peak(records: Iterable[Mapping[str, Any]]) -> int | None:
    """Most bytes that were allocated at a time, of the events of allocations."""
    totals = [
        int(record["args"].get("Total Allocated", 0))
        for record in records
        if record.get("name") == "[memory]" and isinstance(record.get("args"), dict)
    ]
    return max(totals, default=None)


FOLDER = re.compile(r"step-(\d+)")
FILE = re.compile(r"rank-(\d+)\.json\.gz")
WRAPPED = re.compile(r"GeneratedBackwardFor_amfm_(\w+)_default")
PASSES = ("forward", "backward", "recompute")
MOST_OPERATIONS = 12


@dataclass(frozen=True)
class TraceFile:
    """A trace of a run: its step, rank and file."""

    step: int
    rank: int
    path: Path

    def memory(self) -> Path | None:
        """The memory snapshot next to it, if there is one."""
        path = self.path.with_name(f"rank-{self.rank}.memory.pickle")
        return path if path.is_file() else None


@dataclass(frozen=True)
class Profile:
    """A traced step in numbers: milliseconds by kind, by (kind of block, pass), and by operation."""

    file: TraceFile
    milliseconds: float
    untraced_milliseconds: float | None
    on_device: bool
    busy_milliseconds: float
    peak_bytes: int | None
    kinds: dict[str, float]
    blocks: dict[str, dict[str, float]]
    operations: list[dict[str, Any]]

    def as_json(self) -> dict[str, Any]:
        """The profile as JSON values."""
        memory = self.file.memory()
        return {
            "step": self.file.step,
            "rank": self.file.rank,
            "trace": str(self.file.path),
            "memory_snapshot": memory and str(memory),
            "milliseconds": self.milliseconds,
            "untraced_milliseconds": self.untraced_milliseconds,
            "on_device": self.on_device,
            "busy_milliseconds": self.busy_milliseconds,
            "peak_bytes": self.peak_bytes,
            "kinds": self.kinds,
            "blocks": self.blocks,
            "operations": self.operations,
        }


def list_traces(run_dir: Path) -> list[TraceFile]:
    """Traces of a run, by step and rank. Raises ValueError with what to do if there is none."""
    found = [
        TraceFile(int(folder[1]), int(name[1]), path)
        for path in sorted((run_dir / "profile").glob("step-*/rank-*.json.gz"))
        if (folder := FOLDER.fullmatch(path.parent.name)) and (name := FILE.fullmatch(path.name))
    ]
    if not found:
        raise ValueError(
            f"{run_dir} has no trace; train it with train.profile='{{steps: [20]}}' on the command line, where 20 is a step "
            "that it has not done yet"
        )
    return sorted(found, key=lambda file: (file.step, file.rank))


def choose_trace(files: Sequence[TraceFile], step: int | None, rank: int | None) -> TraceFile:
    """The newest step's first rank, or what is asked for. Raises ValueError naming what there is."""
    fitting = [file for file in files if step in (None, file.step) and rank in (None, file.rank)]
    if not fitting:
        known = ", ".join(f"step {file.step} of rank {file.rank}" for file in files)
        raise ValueError(f"there is no trace of --step {step} --rank {rank}; there are {known}")
    newest = max(file.step for file in fitting)
    return next(file for file in fitting if file.step == newest)


def profile_run(run_dir: Path, step: int | None = None, rank: int | None = None) -> Profile:
    """Read a trace of a run and sum it up. Raises ValueError for a run without a trace and for a damaged one."""
    files = list_traces(run_dir)
    file = choose_trace(files, step, rank)
    traced = {one.step for one in files}
    others = [
        line["seconds"] for line in read_run(run_dir).metrics if line["step"] not in traced and line.get("seconds")
    ]
    return summarize(file, read_trace(file.path), 1000 * statistics.median(others) if others else None)


def summarize(file: TraceFile, trace: StepTrace, untraced_milliseconds: float | None) -> Profile:
    """Sum a trace by kind of work, kind of block and operation."""
    kinds: dict[str, float] = {}
    blocks: dict[str, dict[str, float]] = {}
    for share, time in trace.shares.items():
        kinds[share.kind] = kinds.get(share.kind, 0.0) + time / 1000
        if share.kind in PASSES and share.part != "-":
            row = blocks.setdefault(name_part(share.part), dict.fromkeys(PASSES, 0.0))
            row[share.kind] += time / 1000
    if trace.on_device:
        kinds["idle"] = max(0.0, trace.duration - trace.busy) / 1000
    ranked = sorted(trace.operations.items(), key=lambda item: -item[1][0])[:MOST_OPERATIONS]
    return Profile(
        file,
        trace.duration / 1000,
        untraced_milliseconds,
        trace.on_device,
        trace.busy / 1000,
        trace.peak_bytes,
        dict(sorted(kinds.items(), key=lambda item: -item[1])),
        dict(sorted(blocks.items(), key=lambda item: -sum(item[1].values()))),
        [
            {"operation": name_operation(name), "kind": kind, "milliseconds": time / 1000, "calls": calls}
            for (name, kind), (time, calls) in ranked
        ],
    )


def name_part(part: str) -> str:
    """The kind of a block in words, or the part itself."""
    return describe_symbol(part.rsplit(maxsplit=1)[-1]) if part.startswith("block ") else part


def name_operation(name: str) -> str:
    """An operation as our code names it: PyTorch wraps an operation of ours in a function with a long name."""
    return WRAPPED.sub(r"amfm::\1", name)


def describe_peak(profile: Profile) -> str:
    """The most memory of the step in words."""
    return "not traced (train.profile.memory=true)" if profile.peak_bytes is None else format_bytes(profile.peak_bytes)
