"""Follows a run from outside, by what it writes into its directory: metrics.jsonl, events.jsonl and heartbeats.

Nothing is asked of the run, so any machine that sees the directory can watch, and a watcher cannot disturb. Files are
read while they grow: a line counts when its newline is there, and a file that shrank or was replaced (a run that
resumes drops the steps that it does again) is read again. Whether a run lives is told by its heartbeats: fresh ones, or
ones that change while we look, because clocks of two machines may differ.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from amfm.data_pipeline.durable.files import named
from amfm.data_pipeline.durable.json_files import open_regular, parse_line
from amfm.pretrain.config.file import load_config
from amfm.pretrain.config.schema import RunConfig
from amfm.pretrain.monitor.beats import Beat, describe_lost, read_beats
from amfm.pretrain.monitor.panel import RunState, plural
from amfm.pretrain.stages import total_steps

State = Literal["waiting", "running", "finished", "stopped", "failed", "lost"]
MARKS = ("config.yaml", "metrics.jsonl", "events.jsonl", "heartbeats", "lock")
FIRST_BYTES = 1 << 22  # of a long file only its end is read
FRESH_SECONDS = 10.0  # a rank writes every two seconds
NUMBERS = ("step", "lr", "tokens", "tokens_per_second", "mfu", "seconds")
ENDS: dict[str, State] = {"signal": "stopped", "failed": "failed", "gave_up": "failed"}


class GrowingFile:
    """New whole lines of a file that someone else appends to, at every `read`; it may not exist yet."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._place = 0
        self._inode: int | None = None

    def read(self) -> tuple[bool, list[dict[str, Any]]]:
        """(whether the file is another one than at the last call, its new lines). What is not an object is left out."""
        try:
            with named(self.path), open_regular(self.path) as file:
                status = os.fstat(file.fileno())
                is_new = status.st_ino != self._inode or status.st_size < self._place
                if is_new:
                    self._inode, self._place = status.st_ino, max(0, status.st_size - FIRST_BYTES)
                file.seek(self._place)
                content = file.read(status.st_size - self._place)
        except FileNotFoundError:
            return False, []
        whole = content[: content.rfind(b"\n") + 1]
        lines = whole.split(b"\n")
        if is_new and self._place > 0:
            del lines[0]  # we began in the middle of it
        self._place += len(whole)
        return is_new, [record for line in lines if line.strip() and (record := parse_line(line)) is not None]


@dataclass(frozen=True)
class Seen:
    """What the last look found: new metrics and events, the ranks that were heard of, how the run is and why."""

    metrics: list[dict[str, Any]]
    events: list[dict[str, Any]]
    beats: list[Beat]
    state: State
    cause: str


class FollowedRun:
    """One run directory under watch. Raises FileNotFoundError for something that is not a run directory."""

    def __init__(self, directory: Path) -> None:
        if not any((directory / mark).exists() for mark in MARKS):
            raise FileNotFoundError(
                f"{directory} is not a run directory; give run.dir of a run that was started (amfm runs lists those below a folder)"
            )
        self.directory = directory
        self.config: RunConfig | None = None
        self.panel = RunState(f"amfm watch {directory.resolve().name}", first_step=0, last_step=0, began=None)
        self.state: State = "waiting"
        self.cause = ""
        self.starts = 0
        self.has_steps = False  # whether any was logged
        self._looked = False
        self._metrics = GrowingFile(directory / "metrics.jsonl")
        self._events = GrowingFile(directory / "events.jsonl")
        self._heard: dict[int, tuple[float, float]] = {}  # rank -> (its time, ours when that changed)
        written = [(directory / name).stat().st_mtime for name in MARKS if (directory / name).exists()]
        self._written = time.monotonic() - max(0.0, time.time() - max(written))  # when something last grew

    def poll(self) -> Seen:
        """Read what is new, and judge how the run is."""
        _, events = self._events.read()
        for event in events:
            self._take_event(event)
        self._read_config()
        is_new, lines = self._metrics.read()
        if is_new:
            for curve in self.panel.curves.values():
                curve.clear()
            self.panel.seconds.clear()
        if (events or lines) and self._looked:
            self._written = time.monotonic()
        self._looked = True
        self.has_steps |= any(isinstance(line.get("step"), int) for line in lines)
        metrics = [line for line in lines if is_step(line)]
        for line in metrics:
            self.panel.take_metrics(line)
        beats = read_beats(self.directory / "heartbeats")
        self._judge(beats)
        self.panel.is_over = self.state != "running"
        self.panel.status = self.describe(beats)
        return Seen(metrics, events, beats, self.state, self.cause)

    def final(self) -> Seen:
        """Look, and where no rank seems to live look again for a while: its clock may be behind ours."""
        seen = self.poll()
        deadline = time.monotonic() + FRESH_SECONDS / 2
        while seen.state == "lost" and seen.beats and time.monotonic() < deadline:
            time.sleep(0.5)
            seen = self.poll()
        return seen

    def describe(self, beats: list[Beat]) -> str:
        """Report in a line how the run is."""
        if self.state == "running" and not beats:
            return "running: it starts, or ends"
        if self.state == "running":
            hosts = len({beat.host for beat in beats})
            silent = self.silent(beats)
            place = max(beats, key=Beat.place)
            if silent:
                return f"{plural(len(beats), 'rank')}, but {describe_lost(silent)}"
            return f"running: {plural(len(beats), 'rank')} on {plural(hosts, 'host')}, at step {place.step:,}, {place.phase}"
        if self.state == "lost":
            where = describe_lost(beats) if beats else "no rank sends a heartbeat, and none reported why"
            return f"gone: {where}; the same command resumes from {self.panel.describe_checkpoint()}"
        if self.state == "waiting":
            return self.cause or "not begun: no rank has written anything yet"
        return f"{self.state}{': ' if self.cause else ''}{self.cause}"

    def to_json(self, seen: Seen) -> dict[str, Any]:
        """The state of the run as JSON values."""
        metrics = self.panel.metrics or {}
        keys = ("step", "loss", "grad_norm", "lr", "tokens", "tokens_per_second", "mfu", "memory_bytes")
        return {
            "run_dir": str(self.directory),
            "state": seen.state,
            "cause": seen.cause,
            "steps": self.panel.last_step or None,
            **{key: metrics.get(key) for key in keys},
            "validation_loss": self.panel.validation_loss,
            "checkpoint_step": self.panel.checkpoint_step,
            "ranks": [
                {"rank": beat.rank, "host": beat.host, "step": beat.step, "phase": beat.phase, "seen": beat.seen}
                for beat in seen.beats
            ],
        }

    def _read_config(self) -> None:
        """Read the configuration once it is there, and again after a start, which may have changed it."""
        path = self.directory / "config.yaml"
        if self.config is None and path.is_file():
            try:
                self.config = load_config(path)
            except ValueError:
                if self.state != "waiting":  # it is being written while a run begins; later it is damaged
                    raise
                return
            steps = total_steps(self.config)
            self.panel.last_step = min(steps, self.config.train.stop_after_steps or steps)
            self.panel.num_steps = steps

    def _take_event(self, event: dict[str, Any]) -> None:
        kind, step = event.get("event"), event.get("step")
        moment = to_seconds(event.get("time"))
        clock = "" if moment is None else time.strftime("%H:%M ", time.localtime(moment))
        self.panel.events.append(
            f"{clock}{str(kind).replace('_', ' ')}{f', step {step:,}' if isinstance(step, int) else ''}"
        )
        if kind == "start" and isinstance(step, int):
            self.config = None
            self.starts += 1
            self.state, self.cause = "running", ""
            self.panel.first_step, self.panel.began = step, moment
            self.panel.shows_mfu = event.get("device") != "cpu"
        elif kind == "checkpoint" and isinstance(step, int):
            self.panel.checkpoint_step, self.panel.checkpoint_time = step, moment
        elif kind in ("rolled_back_to", "rolled_forward") and isinstance(step, int):
            self.panel.checkpoint_step, self.panel.checkpoint_time = step, None
        elif kind == "end":
            is_whole = event.get("reason") == "finished"
            self.state, self.cause = ("finished", "") if is_whole else ("stopped", str(event.get("reason", "")))
        elif kind == "next_layout":
            self.state, self.cause = (
                "waiting",
                f"saved: stage {event.get('stage')} has another layout, its ranks restart",
            )
        elif kind == "guide_removed":
            self.state, self.cause = "waiting", "saved: the guides are gone, its ranks restart without them"
        elif isinstance(kind, str) and kind in ENDS:
            texts = (event.get("name"), event.get("error"), event.get("cause"))
            self.state, self.cause = ENDS[kind], next((str(text) for text in texts if text), "")

    def _judge(self, beats: list[Beat]) -> None:
        """Hold what the events said against the heartbeats."""
        now = time.monotonic()
        for beat in beats:
            if self._heard.get(beat.rank, (None, 0.0))[0] != beat.seen:
                # At first sight the clocks are believed; from then on only that the beat changes.
                age = max(0.0, time.time() - beat.seen) if beat.rank not in self._heard else 0.0
                self._heard[beat.rank] = (beat.seen, now - age)
        is_alive = len(self.silent(beats)) < len(beats)
        has_ended = self.state in ("finished", "stopped", "failed") or (self.state == "waiting" and self.cause)
        if is_alive and has_ended:
            if all(beat.phase in ("start", "compile") for beat in beats):  # the next start is on its way
                self.state, self.cause = "running", ""
        elif is_alive:
            self.state = "running"
        elif self.state == "running" and now - self._written > FRESH_SECONDS:
            # A start is written down before its ranks give signs of life, so lines count as such as well. One whose last
            # step is saved did all that it was asked for: what is lost is the line that says so.
            done = 0 if self.panel.metrics is None else self.panel.metrics["step"]
            is_whole = done >= self.panel.num_steps and self.panel.checkpoint_step == done
            self.state = "finished" if is_whole else "lost"

    def silent(self, beats: list[Beat]) -> list[Beat]:
        """Ranks whose beat has not changed for FRESH_SECONDS."""
        now = time.monotonic()
        return [beat for beat in beats if now - self._heard[beat.rank][1] > FRESH_SECONDS]


def is_step(line: dict[str, Any]) -> bool:
    """Whether a line of metrics.jsonl has what the panel shows; files of others may hold anything."""
    has_numbers = all(isinstance(line.get(key), int | float) for key in NUMBERS)
    has_nullable = all(isinstance(line.get(key, ""), int | float | None) for key in ("loss", "grad_norm"))
    return has_numbers and has_nullable and isinstance(line.get("expert_load"), dict) and "skipped" in line


def to_seconds(moment: object) -> float | None:
    """Seconds since the epoch of an event's time; None for what is none."""
    try:
        return datetime.fromisoformat(str(moment)).timestamp()
    except ValueError:
        return None


def follow(run: FollowedRun, *, every_seconds: float, stays: bool) -> Iterator[Seen]:
    """Look again and again, until the run has ended or is gone; with `stays` until someone interrupts."""
    while True:
        seen = run.final()
        yield seen
        if not stays and seen.state not in ("running", "waiting"):
            return
        time.sleep(every_seconds)
