"""The record of what gave no document: a file of JSON lines a unit below STORE/rejects, and the first of them in words.

A position names the file as the plan does (`0/a.jsonl`: below the source's first path), so that the bytes of a store don't
depend on where its text lay. For a person the path as it is here stands in its place.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from amfm.data_pipeline.durable.files import write_file_atomically
from amfm.data_pipeline.durable.lines import read_lines
from amfm.data_pipeline.prepare.documents import DAMAGED, Reject, Segment
from amfm.data_pipeline.prepare.plan import Unit


def rejects_path(store: Path, unit: Unit) -> Path:
    """Path of the JSON lines with position and reason of each record of the unit that gave no document."""
    return store / "rejects" / unit.source / f"{unit.number:06d}.jsonl"


def write_rejects(store: Path, unit: Unit, rejects: Sequence[Reject]) -> None:
    """Write the rejects of a unit, or remove those of an earlier attempt."""
    path = rejects_path(store, unit)
    if not rejects:
        path.unlink(missing_ok=True)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"position": item.position, "reason": item.reason}) + "\n" for item in rejects]
    write_file_atomically(path, "".join(lines).encode())


def describe_first_reject(store: Path, units: Sequence[Unit]) -> str | None:
    """Where the first reject of these units is, and why: `texts/a.jsonl:line 3 (byte 18): not JSON: ...`; None without."""
    return _describe_first(store, units, "")


def describe_first_damage(store: Path, units: Sequence[Unit]) -> str | None:
    """Where the first damaged file of these units is, and why, as `describe_first_reject` says it; None without."""
    return _describe_first(store, units, DAMAGED)


def _describe_first(store: Path, units: Sequence[Unit], reason: str) -> str | None:
    for unit in units:
        path = rejects_path(store, unit)
        for _, record in read_lines(path) if path.is_file() else ():
            if record is not None and str(record["reason"]).startswith(reason):
                return f"{place_of(str(record['position']), unit.segments)}: {record['reason']}"
    return None


def place_of(position: str, segments: Sequence[Segment]) -> str:
    """A position with the path of its file in the place of the plan's name for it."""
    for segment in segments:
        if position == segment.file.name or position.startswith(f"{segment.file.name}:"):
            return segment.file.shown + position.removeprefix(segment.file.name)
    return position
