"""What ranks, launchers and later starts of a run tell each other: exit codes, environment variables, and the run's events.

Imports little, and no PyTorch, so that launchers start fast.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from amfm.data_pipeline.durable.json_files import LineFile, read_lines

DONE = 0
BAD_INPUT = 2  # settings and files: the same command would be rejected again
RUN_FAILED = 3  # the machine's state: the same command may continue
NEXT_LAYOUT = 4  # saved where another layout begins, or a model without guides: the same command continues, again
INTERRUPTED = 130  # Ctrl-C, as shells count it: a script must not take the run for finished

LAUNCHER_PID = "AMFM_LAUNCHER_PID"  # of launch/cluster/local.py: its ranks end with it
GOES_ON = "AMFM_LAUNCHER_GOES_ON"  # its launcher starts a stage of another layout on as many ranks as that needs
TORCHRUN_RESTARTS = "TORCHELASTIC_RESTART_COUNT"  # how often torchrun itself has started its ranks again
STOPPED_FAILS = "AMFM_STOPPED_FAILS"  # a launcher ends with 3 where a signal stopped a run that has steps left: Kubernetes takes 0 for its end
RESTART_CAUSE = "AMFM_RESTART_CAUSE"  # why the attempt before this one ended; goes into the event log


ENDS = ("end", "signal")  # the last word of a start that ended in good order
FRESH_START_EVENTS = ("next_layout", "guide_removed")  # of ranks that restart in good order
IN_ORDER = (*ENDS, "rolled_back_to", "rolled_forward", *FRESH_START_EVENTS)  # or what may follow it

VANISHED = (
    "all ranks ended with code 0 and the run's events report no end: a plug-in or a library ended the process; the same command "
    "continues from the newest checkpoint"
)


def read_events(run_dir: Path) -> Iterator[dict[str, Any]]:
    """The events of a run that can be read, in their order; none where the file is absent."""
    path = run_dir / "events.jsonl"
    if path.is_file():
        yield from (record for _, record in read_lines(path) if record is not None)


def append_event(run_dir: Path, event: str, step: int, **details: Any) -> None:
    """Append one event to a run's log, for who does not have it open; the caller holds the run's lock."""
    events = LineFile(run_dir / "events.jsonl")
    events.write(describe_event(event, step, **details))
    events.sync()
    events.close()


# `time.time() - read_steady()` when this process began to log.
_offsets: list[float] = []


def read_steady() -> float:
    """Seconds of a clock that no one sets, which also counts while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


def log_time() -> float:
    """Seconds since 1970, by the clock as it was when this process first asked.

    Differences between two lines of a log that one process wrote are durations, also where the clock was set meanwhile.
    """
    if not _offsets:
        _offsets.append(time.time() - read_steady())
    return _offsets[0] + read_steady()


def describe_event(event: str, step: int, **details: Any) -> dict[str, Any]:
    """An event as a line of events.jsonl has it, of this moment."""
    return {"time": in_iso(log_time()), "event": event, "step": step, **details}


def in_iso(seconds: float) -> str:
    """Seconds since 1970 as ISO 8601, in UTC and milliseconds."""
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat(timespec="milliseconds")


def find_saved(run_dir: Path) -> set[int]:
    """The steps of the checkpoints that were saved in a run directory and not set aside by a rollback, as its events report.

    Pruning may have removed some.
    """
    saved: set[int] = set()
    for event in read_events(run_dir):
        step = event.get("step")
        if event.get("event") == "checkpoint" and isinstance(step, int):
            saved.add(step)
        elif event.get("event") == "rolled_back_to" and isinstance(step, int):
            saved = {each for each in saved if each <= step}
        elif event.get("event") == "rolled_forward" and isinstance(event.get("steps"), list):
            saved |= {each for each in event["steps"] if isinstance(each, int)}
    return saved


def is_rolled_back(run_dir: Path) -> bool:
    """Whether a run was rolled back since its newest start."""
    words = [event["event"] for event in read_events(run_dir) if event.get("event") in ("start", "rolled_back_to")]
    return words[-1:] == ["rolled_back_to"]


def find_rollback(run_dir: Path) -> int | None:
    """The step that a run was last rolled back to on purpose; None if it never was."""
    steps = [event.get("step") for event in read_events(run_dir) if event.get("event") == "rolled_back_to"]
    return steps[-1] if steps and isinstance(steps[-1], int) else None


def last_word(run_dir: Path, seen: int = 0) -> str | None:
    """How the newest start of a run ended in good order, by its events after the first `seen`; None if it has not said."""
    words = [str(event.get("event")) for event in read_events(run_dir)]
    new = words[seen:] if len(words) >= seen else words  # someone emptied the file
    return next((word for word in reversed(new) if word in ENDS), None)


def has_vanished(run_dir: Path) -> bool:
    """Whether the newest start of a run left no word of its end: its exit code 0 is then a library's that called `_exit`.

    False if there are no events, as on another machine's disk.
    """
    has_ended = True
    for event in read_events(run_dir):
        has_ended = event.get("event") != "start" and (has_ended or event.get("event") in ENDS)
    return not has_ended
