"""Reads a run directory into what a report shows; works while the run is still going.

Needs config.yaml and metrics.jsonl; events and environment may be missing. A run that was killed leaves a truncated last
line, and one that resumed repeats steps: both are normal here, so damaged lines become notes and the newest line of a
step counts.

Which start of a run did which of its steps, by its events: a resume or a rollback takes steps away from the starts before.

Starts that recorded no number of discarded steps count as if they had been cut nowhere: releases before that wrote none.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

from amfm.data_pipeline.durable.json_files import read_lines, read_object
from amfm.model.flops import Counts, count_parameters, flops_per_token
from amfm.pretrain.config.file import load_config
from amfm.pretrain.config.schema import RunConfig
from amfm.pretrain.stages import RunStage, resolve_stages

MAX_HOSTS = 4  # that are named on one line
Steps = tuple[int, int]  # the first and the last of a range


@dataclass
class Attempt:
    """One start: its event, the steps that it did, and those of them that the run still consists of."""

    number: int
    event: Mapping[str, Any]
    first_step: int
    last_step: int | None = None
    kept: list[Steps] = field(default_factory=list)

    def did(self, step: int) -> bool:
        """Whether it did a step, kept or not."""
        return self.last_step is not None and self.first_step <= step <= self.last_step

    def keeps(self, step: int) -> bool:
        """Whether the run's present state went through this start's step."""
        return any(first <= step <= last for first, last in self.kept)

    def close(self, last_step: int) -> None:
        """Note where it ended, unless that is known."""
        if self.last_step is None:
            self.last_step = max(last_step, self.first_step - 1)
            self.kept = [(self.first_step, self.last_step)] if self.last_step >= self.first_step else []

    def cut(self, step: int) -> list[Steps]:
        """Take away the steps after this one, and return them."""
        taken = [(max(first, step + 1), last) for first, last in self.kept if last > step]
        self.kept = [(first, min(last, step)) for first, last in self.kept if first <= step]
        return taken

    def describe(self) -> dict[str, Any]:
        """What it was, as JSON values."""
        return {
            "start": self.number,
            "time": self.event.get("time"),
            "steps": [self.first_step, self.last_step],
            "kept": [list(steps) for steps in self.kept],
            **{name: self.event.get(name) for name in ("hosts", "job", "code", "versions", "config", "config_sha256")},
        }

    def words(self) -> tuple[str, ...]:
        """Number, time, steps that it did, steps kept, hosts, job, code and configuration, each on one line."""
        hosts, job = self.event.get("hosts") or {}, self.event.get("job") or {}
        named = ", ".join(f"{host} ({ranks})" for host, ranks in list(hosts.items())[:MAX_HOSTS])
        more = f" and {len(hosts) - MAX_HOSTS:,} more" if len(hosts) > MAX_HOSTS else ""
        kept = ", ".join(f"{first:,}-{last:,}" for first, last in self.kept) or "none"
        return (
            str(self.number),
            str(self.event.get("time") or "-"),
            f"{self.first_step:,}-{self.last_step:,}" if self.did(self.first_step) else "none",
            kept,
            f"{named}{more}" or "-",
            ", ".join(f"{name}={value}" for name, value in job.items()) or "-",
            str(self.event.get("code") or "-"),
            str(self.event.get("config") or "-"),
        )


HEADER = ("start", "time", "steps", "kept", "hosts (ranks)", "job", "code", "configuration")


def list_attempts(events: Iterable[Mapping[str, Any]], newest_step: int) -> list[Attempt]:
    """List the starts of a run, oldest first; newest_step: that metrics.jsonl has."""
    attempts: list[Attempt] = []
    set_aside: dict[Any, list[tuple[Attempt, list[Steps]]]] = {}
    for event in events:
        kind, step = event.get("event"), event.get("step")
        if kind == "rolled_forward":
            for attempt, steps in set_aside.pop(event.get("number"), []):
                attempt.kept += steps
        if kind not in ("start", "rolled_back_to") or not isinstance(step, int):
            continue
        if attempts:
            attempts[-1].close(step + int(event.get("discarded_steps") or 0))
        taken = [(attempt, attempt.cut(step)) for attempt in attempts]
        if kind == "rolled_back_to":
            set_aside[event.get("number")] = taken
        else:
            attempts.append(Attempt(len(attempts) + 1, event, step + 1))
    if attempts:
        attempts[-1].close(newest_step)
    return attempts


Metrics = dict[str, Any]


@dataclass(frozen=True)
class RunRecord:
    """A run as its directory tells it: metrics by step, events and environment; `notes` says what was unreadable.

    gap: which steps its logs lack; sums over steps are then not those of the run.
    """

    directory: Path
    config: RunConfig
    metrics: tuple[Metrics, ...]
    events: tuple[dict[str, Any], ...]
    environment: dict[str, Any]
    notes: tuple[str, ...]
    gap: str | None = None

    @cached_property
    def stages(self) -> tuple[RunStage, ...]:
        """The training stages of the run."""
        return resolve_stages(self.config)

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.stages[-1].last_step

    @cached_property
    def counts(self) -> Counts:
        """Parameters by kind of block: as the run recorded them, or counted, which imports torch."""
        kinds = self.environment.get("model", {}).get("by_kind")
        if kinds is None:
            return count_parameters(self.config.model)
        total, active = kinds["parameters"], kinds["active_parameters"]
        return Counts(sum(total.values()), sum(active.values()), total, active)

    def flops_per_token(self, sequence_length: int) -> dict[str, float]:
        """Training FLOPs of one token by kind of block, in rows of this length: as recorded, or counted."""
        recorded = self.environment.get("model", {}).get("by_kind", {}).get("flops_per_token", {})
        found: dict[str, float] | None = recorded.get(str(sequence_length))
        return flops_per_token(self.config.model, sequence_length) if found is None else found

    def name(self) -> str:
        """Name the run: as configured, else the last part of its directory."""
        return self.config.run.name or Path(self.config.run.dir).name

    def last_step(self) -> int:
        """Find the newest step that has metrics, counted from 1."""
        return int(self.metrics[-1]["step"])

    def is_finished(self) -> bool:
        """Whether all steps of the configuration are done."""
        return self.last_step() >= self.num_steps

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """(steps, values) of one metric, at the steps that have it as a finite number."""
        pairs = [(int(line["step"]), float(line[key])) for line in self.metrics if is_number(line.get(key))]
        return [step for step, _ in pairs], [value for _, value in pairs]

    def named_series(self, key: str) -> dict[str, tuple[list[int], list[float]]]:
        """Collect name -> (steps, values) of a metric that holds one number a name (auxiliary losses, expert load).

        `key`: dotted for one inside of another. Of a list the names are places, from 1.
        """
        found: dict[str, tuple[list[int], list[float]]] = {}
        for line in self.metrics:
            held: Any = line
            for part in key.split("."):
                held = held.get(part) or {} if isinstance(held, dict) else {}
            if isinstance(held, list):
                held = dict(enumerate(held, 1))
            for name, value in held.items() if isinstance(held, dict) else ():
                if is_number(value):
                    steps, values = found.setdefault(str(name), ([], []))
                    steps.append(int(line["step"]))
                    values.append(float(value))
        return found

    def last(self, key: str) -> float | None:
        """Look up the newest finite value of one metric, None if it was never measured."""
        values = self.series(key)[1]
        return values[-1] if values else None

    def typical(self, key: str) -> float | None:
        """Compute the median of a metric since the newest start of the run, in the newer half of its steps.

        Another start may have other ranks, another device or another measured peak; and the first steps of each include
        warm-up of caches and compilers.
        """
        steps, values = self.series(key)
        newest = [value for step, value in zip(steps, values) if step > self.newest_start()] or values
        return median(newest[len(newest) // 2 :]) if newest else None

    def newest_start(self) -> int:
        """Find the step from which the newest start of the run continued, 0 for the first one."""
        found = [event.get("step") for event in self.events if event.get("event") == "start"]
        return found[-1] if found and isinstance(found[-1], int) else 0

    def seconds(self) -> float:
        """Time inside steps, summed over all starts of the run."""
        return sum(self.series("seconds")[1])


def is_number(value: object) -> bool:
    """Whether a metric can be drawn."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def read_run(directory: str | Path) -> RunRecord:
    """Read a run directory.

    Raises FileNotFoundError if it is not a run directory, ValueError if no step was logged yet or the configuration in
    it cannot be read. A step that was logged twice (a resumed run repeats the steps after its checkpoint) counts once,
    as logged last.
    """
    folder = Path(directory)
    config_path, metrics_path = folder / "config.yaml", folder / "metrics.jsonl"
    for path in (config_path, metrics_path):
        if not path.is_file():
            raise FileNotFoundError(
                f"{folder} holds no {path.name}, so it is not a run directory; give run.dir of a started run (amfm runs lists those "
                "below a folder)"
            )
    lines, notes = read_json_lines(metrics_path)
    by_step = {int(line["step"]): line for line in lines if is_number(line.get("step"))}
    if not by_step:
        raise ValueError(f"{metrics_path} has no step yet; write the report after the first training step")
    events_path, environment_path = folder / "events.jsonl", folder / "environment.json"
    events, event_notes = read_json_lines(events_path) if events_path.is_file() else ([], [])
    environment = read_object(environment_path) if environment_path.is_file() else {}
    steps = sorted(by_step)
    gap = find_gap(steps, events)
    return RunRecord(
        directory=folder,
        config=load_config(config_path),
        metrics=tuple(by_step[step] for step in steps),
        events=tuple(events),
        environment=environment,
        notes=(*notes, *event_notes, *([gap] if gap else [])),
        gap=gap,
    )


def find_gap(steps: Sequence[int], events: Sequence[Mapping[str, Any]]) -> str | None:
    """Which steps metrics.jsonl lacks of those that starts in events.jsonl trained, or the other way round; None: neither.

    A log that was renamed or emptied while the run wrote to it leaves such a gap.
    """
    found = [event.get("step") for event in events if event.get("event") == "start"]
    starts = [step for step in found if isinstance(step, int)]
    if not starts or len(starts) < len(found):
        return None  # written by a release that recorded less
    first = min(starts) + 1
    missing = sorted(set(range(first, steps[-1] + 1)).difference(steps))
    if missing:
        where = f"metrics.jsonl has no lines of {len(missing):,} of the steps {first:,} to {steps[-1]:,}, the first is {missing[0]:,}"
    elif steps[0] < first:
        where = f"events.jsonl has no start that trained steps {steps[0]:,} to {first - 1:,}"
    else:
        return None
    return f"{where}: was it renamed or emptied? Times are sums over the steps that are there, and goodput is not known"


def read_json_lines(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """(objects, notes) of a file with one JSON object a line; a line truncated by a kill is left out and noted."""
    objects: list[dict[str, Any]] = []
    notes: list[str] = []
    for number, record in read_lines(path):
        if record is not None:
            objects.append(record)
        else:
            notes.append(f"{path.name}: line {number} is truncated or damaged and left out")
    return objects, notes
