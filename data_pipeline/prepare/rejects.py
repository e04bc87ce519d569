"""The record of what gave no document: a file of JSON lines a unit below STORE/rejects, and the first of them in words.

A position names the file as the plan does (`0/a.jsonl`: below the source's first path), so that the bytes of a store do not
depend on where its text lay. For a person the path as it is here stands in its place, and the line of a byte.

A file of something else than JSON lines gives as many rejects as lines, more than memory and disk may hold: they are written
as they come, and from some number on they are only counted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

from amfm.data_pipeline.durable.files import replacing
from amfm.data_pipeline.durable.json_files import read_lines
from amfm.data_pipeline.prepare.plan import Unit
from amfm.data_pipeline.prepare.records import DAMAGED, Reject
from amfm.data_pipeline.prepare.segments import Segment
from amfm.data_pipeline.prepare.sources import InputFile
from amfm.data_pipeline.store.object_store import is_url

MAX_LISTED = 100_000  # rejects of a unit that are written, some 10 MB
COUNTED_BYTES = 2**30  # as far into a file lines are counted, to print where a record is


def rejects_path(store: Path, unit: Unit) -> Path:
    """Path of the JSON lines with position and reason of each record of the unit that gave no document."""
    return store / "rejects" / unit.source / f"{unit.number:06d}.jsonl"


class RejectList:
    """Counts the rejects of a unit, and writes the first MAX_LISTED of them and each that stands for a damaged file."""

    def __init__(self, path: Path, stack: ExitStack) -> None:
        self.path, self.stack = path, stack
        self.number = 0
        self._file: IO[bytes] | None = None

    def append(self, reject: Reject) -> None:
        """Count one, and write it. Raises OSError of the disk."""
        self.number += 1
        if self.number > MAX_LISTED and not reject.reason.startswith(DAMAGED):
            return
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.stack.enter_context(replacing(self.path))
        self._file.write(json.dumps({"position": reject.position, "reason": reject.reason}).encode() + b"\n")


@contextmanager
def listing_rejects(store: Path, unit: Unit) -> Iterator[RejectList]:
    """Yield the list of a unit's rejects, which takes the place of that of an earlier attempt when the block ends well."""
    path = rejects_path(store, unit)
    with ExitStack() as stack:
        rejects = RejectList(path, stack)
        yield rejects
        if not rejects.number:
            path.unlink(missing_ok=True)


def count_rejects(store: Path, units: Sequence[Unit], reason: str) -> int:
    """Count the listed rejects of these units whose reason ends in this one."""
    paths = [path for unit in units if (path := rejects_path(store, unit)).is_file()]
    records = (record for path in paths for _, record in read_lines(path) if record is not None)
    return sum(str(record["reason"]).endswith(reason) for record in records)


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
    """A position with the path of its file instead of the plan's name for it, and the line of a byte."""
    for segment in segments:
        file = segment.file
        if position == file.name or position.startswith(f"{file.name}:"):
            place = position.removeprefix(file.name)
            byte = re.fullmatch(r":byte (\d+)", place)
            line = _count_lines(file, int(byte[1])) if byte else None
            return file.shown + (place if line is None else f":line {line} ({place[1:]})")
    return position


def _count_lines(file: InputFile, offset: int) -> int | None:
    """Which line of a plain file holds this byte, from 1; None where it is far into it, or in one that is not here."""
    if offset > COUNTED_BYTES or is_url(file.path):
        return None
    line = 1
    with file.open() as stream:
        while offset > 0 and (block := stream.read(min(offset, 2**20))):
            line, offset = line + block.count(b"\n"), offset - len(block)
    return line
