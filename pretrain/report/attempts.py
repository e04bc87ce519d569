"""Which start of a run did which of its steps, by its events: a resume or a rollback takes steps away from the starts before.

Starts that recorded no number of discarded steps count as if they had been cut nowhere: releases before that wrote none.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

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
