"""What the events of a run tell to those who come after it: a start in the same directory, and its launcher. Without torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from amfm.data_pipeline.durable.lines import read_lines

ENDS = ("end", "signal")  # the last word of a start that ended in good order

VANISHED = (
    "all ranks ended with code 0 and the run's events report no end: a plug-in or a library ended the process; the same command "
    "continues from the newest checkpoint"
)


def read_events(run_dir: Path) -> Iterator[dict[str, Any]]:
    """The events of a run that can be read, in their order; none where the file is absent."""
    path = run_dir / "events.jsonl"
    if path.is_file():
        yield from (record for _, record in read_lines(path) if record is not None)


def find_saved(run_dir: Path) -> set[int]:
    """The steps of the checkpoints that were saved in a run directory, as its events report; pruning may have removed some."""
    saved = (event.get("step") for event in read_events(run_dir) if event.get("event") == "checkpoint")
    return {step for step in saved if isinstance(step, int)}


def has_vanished(run_dir: Path) -> bool:
    """Whether the newest start of a run left no word of its end: its exit code 0 is then a library's that called `_exit`.

    False where there are no events, as on another machine's disk.
    """
    has_ended = True
    for event in read_events(run_dir):
        has_ended = event.get("event") != "start" and (has_ended or event.get("event") in ENDS)
    return not has_ended
