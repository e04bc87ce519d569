"""The verdict on a run directory: what the rules of health.py find in its logs, and what its state, time, ranks and disk show.

The same for every reader: report, watch, Prometheus, `amfm runs`, and the last lines of `amfm train`. What only a running
run can lack (ranks, room for the next checkpoint) is asked only of a running one.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from amfm.pretrain.checkpoint.names import checkpoint_name
from amfm.pretrain.monitor.beats import Beat, describe_lost
from amfm.pretrain.monitor.follow import FollowedRun, Seen
from amfm.pretrain.monitor.health import Finding, Verdict, judge, number
from amfm.pretrain.monitor.panel import plural
from amfm.pretrain.report.data import RunRecord, read_run
from amfm.pretrain.report.goodput import USES, measure_goodput
from amfm.pretrain.report.numbers import duration

LOW_GOODPUT = 0.75
JUDGED_SECONDS = 1800.0  # of machines held: before that, starting is most of a run
ROOM = 1.1  # times the newest checkpoint must be free for the next one
LAUNCHING = "docs/launching.md"


class Verdicts:
    """Verdicts on one run that is watched: its files are read whole for each, so an older one is given in between."""

    def __init__(self, run: FollowedRun) -> None:
        self.run = run
        self.newest: Verdict | None = None
        self._state, self._due = "", 0.0

    def of(self, seen: Seen) -> Verdict | None:
        """Judge the run by what a look found; None before its first step. ValueError for a damaged configuration.

        In a hundredth of the time at most, or at once where the state has changed.
        """
        if not self.run.has_steps or not (self.run.directory / "config.yaml").is_file():
            return None
        if seen.state != self._state or time.monotonic() >= self._due:
            began = time.monotonic()
            self.newest = judge_run(self.run, seen, read_run(self.run.directory))
            self._state, self._due = seen.state, time.monotonic() + 100 * (time.monotonic() - began)
        return self.newest


def judge_run(followed: FollowedRun, seen: Seen, record: RunRecord) -> Verdict:
    """Judge a run whose files were read. `seen`: what a look at its directory found just now."""
    findings = [*judge_state(followed, seen), *judge(record.metrics, record.events).findings, *judge_goodput(record)]
    if seen.state == "running":
        findings += [
            *judge_ranks(followed, seen, record),
            *judge_disk(record.directory, followed.panel.checkpoint_step),
        ]
    return Verdict(tuple(findings))


def describe_state(record: RunRecord, seen: Seen) -> tuple[str, str]:
    """State, step and cause in words, and which of done, going and bad that is."""
    place = f"step {record.last_step():,} of {record.num_steps:,}"
    if record.is_finished() and seen.state not in ("failed", "lost", "running"):
        return "finished", "done"
    word: str = "unfinished" if seen.state == "waiting" and not seen.cause else seen.state
    if word == "running" and seen.beats and max(seen.beats, key=Beat.place).phase == "save":
        word = "saving"
    return f"{word}: {place}{', ' if seen.cause else ''}{seen.cause}", "bad" if word in ("failed", "lost") else "going"


def judge_state(followed: FollowedRun, seen: Seen) -> Iterator[Finding]:
    """A run that failed, or of which no rank sends a heartbeat."""
    if seen.state == "failed":
        remedy = "the same command continues from the newest checkpoint, once the cause is gone"
        yield Finding("state", f"failed: {seen.cause or 'no cause was written'}", remedy)
    elif seen.state == "lost":
        yield Finding("state", f"lost: {describe_lost(seen.beats) or 'no rank sends a heartbeat'}",
                      f"the same command resumes from {followed.panel.describe_checkpoint()}", LAUNCHING)  # fmt: skip


def judge_goodput(record: RunRecord) -> Iterator[Finding]:
    """A large share of the machines' time that trained nothing, with the use that took most of it."""
    use = measure_goodput(record)
    if use is None or use.held() < JUDGED_SECONDS or use.share() >= LOW_GOODPUT:
        return
    seconds, name = max((seconds, name) for name, seconds in use.parts().items() if name != "steps")
    text = f"{use.share():.0%} of {duration(use.held())} trained what counts: {duration(seconds)} went to {USES[name]}"
    yield Finding("goodput", text, "amfm report shows where the time went", LAUNCHING)


def judge_ranks(followed: FollowedRun, seen: Seen, record: RunRecord) -> Iterator[Finding]:
    """Ranks of a running run that are silent, or of which no heartbeat is there."""
    silent = followed.silent(list(seen.beats))
    if silent:
        yield Finding(
            "ranks", describe_lost(silent), "the watchdog ends the run, and a launcher restarts it", LAUNCHING
        )
    start: Mapping[str, Any] = next((event for event in reversed(record.events) if event.get("event") == "start"), {})
    expected = int(number(start, "world_size") or 0)
    if seen.beats and len(seen.beats) < expected:
        text = f"{plural(expected - len(seen.beats), 'rank')} of {expected} {'has' if expected - len(seen.beats) == 1 else 'have'} no heartbeat"
        yield Finding("ranks", text, "look at the newest lines of their logs", LAUNCHING)


def judge_disk(directory: Path, checkpoint_step: int | None) -> Iterator[Finding]:
    """A disk that has no room for another checkpoint of the size of the newest one."""
    if checkpoint_step is None:
        return
    newest = directory / "checkpoints" / checkpoint_name(checkpoint_step)
    size = sum(path.stat().st_size for path in newest.rglob("*") if path.is_file()) if newest.is_dir() else 0
    free = shutil.disk_usage(directory).free
    if free < ROOM * size:
        text = f"{free / 1e9:.1f} GB are free, and a checkpoint needs {size / 1e9:.1f} GB"
        yield Finding("disk", text, "free the disk, or lower train.keep_last", "docs/checkpoints.md")
