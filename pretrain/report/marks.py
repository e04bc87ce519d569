"""What happened to a run, as marks below its curves: by kind, all of them, those near each other gathered; and its stages.

A long run may have skipped thousands of steps: marks of one kind in the same of SPANS spans of its steps are one with a
count. The page gathers further, as far as its pixels go.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from amfm.pretrain.report.data import RunRecord

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
