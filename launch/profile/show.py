"""Tables of a traced step: by kind of work, by kind of block, and the operations that took longest."""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amfm.data_pipeline.terminal import format_bytes
from amfm.launch.profile.trace import StepTrace, read_trace
from amfm.model.config.kinds import describe_symbol
from amfm.pretrain.report.data import read_run

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
