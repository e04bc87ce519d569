"""Whether a run is well: what rules find in its logs, and what its state, time, ranks and disk show.

The same for every reader: report, watch, Prometheus, `amfm runs`, and the last lines of `amfm train`. What only a running
run can lack (ranks, room for the next checkpoint) is asked only of a running one.

Each rule is a function of the lines of metrics and of the events, and gives what it found, what to do, and the page that
explains it. Compared is the newest hundredth of the steps (at least MIN_LINES) with the run's own past; nothing is asked of the
run.

Rows of `amfm runs` are what each run directory of a folder says about its run, with that verdict.
"""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any, Literal

from amfm.pretrain.checkpoint.manifest_file import checkpoint_name
from amfm.pretrain.launcher_protocol import IN_ORDER
from amfm.pretrain.monitor.beats import Beat, describe_lost
from amfm.pretrain.monitor.follow import FollowedRun, Seen, to_seconds
from amfm.pretrain.monitor.panel import plural
from amfm.pretrain.report.data import RunRecord, read_run
from amfm.pretrain.report.goodput import USES, measure_goodput
from amfm.pretrain.report.numbers import duration

LOW_GOODPUT = 0.75
JUDGED_SECONDS = 1800.0  # of machines held: before that, starting is most of a run
ROOM = 1.1  # times the newest checkpoint must be free for the next one
LAUNCHING = "docs/launching.md"
Line = Mapping[str, Any]
Lines = Sequence[Line]

MIN_LINES = 10  # fewer say nothing about what is usual
MOST_SKIPPED = 0.001  # of all steps
LOSS_ABOVE_BEST = 1.05
GRAD_NORM_ABOVE_USUAL = 5.0
STEP_ABOVE_USUAL = 1.5
DEBUGGING = "docs/debugging.md"


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


@dataclass(frozen=True)
class Finding:
    """What a rule found: in words, what to do, and the page to read."""

    rule: str
    text: str
    remedy: str
    page: str = DEBUGGING


@dataclass(frozen=True)
class Verdict:
    """Whether a run is well, and else why not."""

    findings: tuple[Finding, ...]

    @property
    def level(self) -> Literal["well", "needs a look"]:
        """One word or three, the same on every screen."""
        return "needs a look" if self.findings else "well"

    def words(self) -> str:
        """The verdict in one line."""
        texts = "; ".join(finding.text for finding in self.findings)
        return f"{self.level}: {texts}" if texts else self.level

    def to_json(self) -> dict[str, Any]:
        """The verdict as JSON values."""
        return {"level": self.level, "findings": [vars(finding) for finding in self.findings]}


def judge(metrics: Lines, events: Lines) -> Verdict:
    """Apply every rule to a run's lines of metrics, by step, and to its events."""
    size = max(MIN_LINES, len(metrics) // 100)
    newest = metrics[-size:]
    rules = (
        *judge_skips(metrics, events, newest),
        *judge_loss(metrics, size),
        *compare(metrics, newest, "grad_norm", GRAD_NORM_ABOVE_USUAL),
        *compare(metrics, newest, "seconds", STEP_ABOVE_USUAL),
        *judge_events(events),
    )
    return Verdict(rules)


def judge_skips(metrics: Lines, events: Lines, newest: Lines) -> Iterator[Finding]:
    """Steps that no rank applied, by their lines or else their events; spikes; and a loss that is not finite."""
    by_event = {number(event, "step") for event in events if event.get("event") == "skipped_step"}
    skipped = [line["step"] for line in metrics if line.get("skipped", line["step"] in by_event) is True]
    recent = sum(step >= newest[0]["step"] for step in skipped)
    if recent or len(skipped) > MOST_SKIPPED * len(metrics):
        text = f"{recent} of the newest {len(newest)}" if recent else f"{len(skipped):,} of {len(metrics):,}"
        remedy = "look at the events skipped_step: they name samples and parameters"
        yield Finding("skips", f"{text} steps were skipped", remedy)
    spikes = sum("spike" in line for line in newest)
    if spikes:
        remedy = "amfm inspect --spike names the documents of a step"
        yield Finding("spikes", f"{spikes} of the newest {len(newest)} steps are far above those before", remedy)
    if newest and newest[-1].get("loss", 0.0) is None:
        yield Finding("loss", "the newest loss is not finite", "go back with amfm rollback, or lower the learning rate")


def judge_loss(metrics: Lines, size: int) -> Iterator[Finding]:
    """A loss above the lowest that the run had, means over equal spans of steps."""
    pairs = [(int(line["step"]), value) for line in metrics if (value := number(line, "loss")) is not None]
    if len(pairs) < 2 * size:
        return
    spans = [pairs[end - size : end] for end in range(len(pairs), size - 1, -size)]
    means = [(fmean(value for _, value in span), span[-1][0]) for span in spans]
    best, step = min(means)
    if means[0][0] > LOSS_ABOVE_BEST * best:
        text = f"the loss is {means[0][0] / best - 1:.0%} above its lowest ({best:.4g} at step {step:,})"
        yield Finding(
            "loss", text, "compare text and learning rate since then; amfm rollback goes back to a checkpoint"
        )


def compare(metrics: Lines, newest: Lines, key: str, limit: float) -> Iterator[Finding]:
    """A median that is above what the run itself had, by a factor."""
    usual, now = ([value for line in lines if (value := number(line, key)) is not None] for lines in (metrics, newest))
    if len(usual) < 2 * MIN_LINES or not now or median(now) <= limit * median(usual):
        return
    name, remedy = {
        "grad_norm": ("the gradient norm", "lower optimizer.learning_rate, or look at the text of these steps"),
        "seconds": (
            "a step",
            "slow ranks: amfm watch; other programs on a CPU: end them, or start with OMP_WAIT_POLICY=passive",
        ),
    }[key]
    yield Finding(key, f"{name} is {median(now) / median(usual):.1f} times its median over the run", remedy)


def judge_events(events: Lines) -> Iterator[Finding]:
    """What the run itself reported: collapsed experts, rollbacks, failures, copies that were not sent, slow ranks."""
    kinds = [event.get("event") for event in events]
    collapsed = next((event for event in reversed(events) if event.get("event") == "experts_collapsed"), None)
    if collapsed is not None:
        blocks = ", ".join(map(str, collapsed.get("token_share") or ()))
        text = f"routing collapsed in block {blocks} at step {collapsed.get('step')}"
        yield Finding("experts", text, "raise the balance of experts", "docs/moe_balance.md")
    if kinds.count("rolled_back"):
        text = f"{plural(kinds.count('rolled_back'), 'rollback')} after spikes"
        yield Finding("rollbacks", text, "lower optimizer.learning_rate, or look at the text of these steps")
    failures = count_failures(kinds)
    if failures:
        yield Finding("failures", plural(failures, "failure"), "amfm report names the cause of each")
    newest = next((event for event in reversed(events) if event.get("event") == "checkpoint"), {})
    if newest.get("remarks"):
        yield Finding("storage", f"the newest checkpoint: {newest['remarks'][0]}", "free the disk, or reach the store")
    last = max((place for place, kind in enumerate(kinds) if kind == "start"), default=0)
    if "stragglers" in kinds[last:]:
        yield Finding("stragglers", "slow ranks since the newest start", "look at the events stragglers for the hosts")


def count_failures(kinds: Sequence[object]) -> int:
    """Starts that did not end as they were asked to, whoever started the run again; a newest one that is open is none."""
    failures, is_open = 0, False
    for kind in kinds:
        failures += kind == "start" and is_open
        is_open = kind == "start" or (is_open and kind not in IN_ORDER)
    return failures + (kinds[-1:] in (["failed"], ["gave_up"]))


def number(line: Line, key: str) -> float | None:
    """A finite number of a line; None if it has none."""
    value = line.get(key)
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if is_number and value is not None else None


LOGS = {"events.jsonl", "metrics.jsonl"}


@dataclass(frozen=True)
class RunRow:
    """One run. step: the newest, 0 before the first. loss: of the newest step. best: lowest validation loss.

    seconds: for which it held its machines. last_event, last_time: the newest that was written, seconds since 1970.
    """

    run: str
    state: str
    step: int
    steps: int
    loss: float | None
    best: float | None
    best_step: int | None
    tokens: float | None
    tokens_per_second: float | None
    seconds: float | None
    last_event: str
    last_time: float | None
    health: str

    def to_json(self) -> dict[str, Any]:
        """The row as JSON values."""
        return asdict(self)


def find_runs(folder: Path) -> Iterator[Path]:
    """Run directories at or below a folder, in the order of their names; none inside of another, and no links are followed.

    Raises FileNotFoundError for a folder that is not there.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder; give one that holds run directories")
    for place, folders, files in os.walk(folder):
        folders.sort()
        if "config.yaml" in files and LOGS.intersection(files):
            folders.clear()
            yield Path(place)


def read_row(directory: Path, folder: Path) -> RunRow:
    """Read a run directory. Raises ValueError for files in it that cannot be read."""
    followed = FollowedRun(directory)
    seen = followed.poll()
    name = str(directory.relative_to(folder)) if directory != folder else directory.resolve().name
    if not followed.has_steps:
        steps = followed.panel.last_step
        last, moment = find_newest(seen.events, None)
        return RunRow(name, seen.state, 0, steps, None, None, None, None, None, None, last, moment, "-")
    record = read_run(directory)
    steps_of, losses = record.series("validation_loss")
    best, best_step = min(zip(losses, steps_of), default=(None, None))
    last, moment = find_newest(record.events, record.metrics[-1].get("time"))
    use = measure_goodput(record)
    return RunRow(
        name,
        describe_state(record, seen)[0].partition(":")[0],
        record.last_step(),
        record.num_steps,
        number(record.metrics[-1], "loss"),
        best,
        best_step,
        record.last("tokens"),
        record.typical("tokens_per_second"),
        record.seconds() if use is None else use.held(),
        last,
        moment,
        judge_run(followed, seen, record).words(),
    )


def find_newest(events: Sequence[dict[str, Any]], step_time: object) -> tuple[str, float | None]:
    """Name of the newest event, and when it or the newest step was written."""
    times = [moment for event in events[-1:] if (moment := to_seconds(event.get("time"))) is not None]
    times += [float(step_time)] if isinstance(step_time, int | float) else []
    return str(events[-1].get("event")) if events else "-", max(times, default=None)


def sort_rows(rows: Sequence[RunRow], column: str, *, reverse: bool) -> list[RunRow]:
    """Sort by a column, rows without a value in it last."""
    known = [row for row in rows if getattr(row, column) is not None]
    unknown = [row for row in rows if getattr(row, column) is None]
    return sorted(known, key=lambda row: getattr(row, column), reverse=reverse) + unknown
