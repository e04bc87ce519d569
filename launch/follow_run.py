"""What a launcher does besides launching, by the run's files: it posts messages, exports checkpoints and prints how a run ended.

A thread looks at the run directory as `amfm watch` does. Ranks know nothing of it, and what fails in it ends no run.

Exports checkpoints while a run trains (`export.every_steps`): each in a process of its own, one at a time, out of the way.

The process is `amfm export`, at the lowest priority, with one thread and without GPUs, on the launcher's host. Steps do not wait
for it, and what fails in it is said and tried no second time: the checkpoint stands, and can be exported by hand.

Tells a URL what happens to a run (`launch.notify`): lost, restarted, spike, stalled, done, and how else it ended.

A thread of the launcher posts JSON. It asks nothing of the ranks and holds nothing up: a URL that does not answer is
said once, and each message is tried once.

The last lines of `amfm train`: what the run came to, whether it is well, and what to do next.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any, Literal, Protocol
from urllib.parse import urlsplit

from amfm.data_pipeline.terminal import printable
from amfm.launch.console import say
from amfm.launch.rank_command import rank_command
from amfm.pretrain.checkpoint.manifest_file import checkpoint_name, newest_saved_step
from amfm.pretrain.config.schema import RunConfig
from amfm.pretrain.launcher_protocol import NEXT_LAYOUT
from amfm.pretrain.monitor.beats import Beat
from amfm.pretrain.monitor.follow import FollowedRun, Seen, to_seconds
from amfm.pretrain.report.data import RunRecord, read_run
from amfm.pretrain.report.goodput import measure_goodput
from amfm.pretrain.report.numbers import count, duration
from amfm.pretrain.report.verdict import judge_run

Kind = Literal["lost", "restarted", "spike", "stalled", "done", "stopped", "failed"]
POST_SECONDS = 10.0
STALLED_SHARE = 1 / 3  # of launch.heartbeat_seconds, after which the attempt ends
STALLED_SECONDS = 300.0  # if nothing ends it
SLACK = "hooks.slack.com"
OF_EVENTS: dict[str, Kind] = {
    **{"restarted": "restarted", "spike": "spike", "rolled_back": "spike", "skipped_step": "spike"},
    **{"failed": "failed", "gave_up": "failed", "signal": "stopped", "end": "done"},
}


@dataclass(frozen=True)
class Message:
    """What is posted: what it is about, at which step, and a sentence."""

    kind: Kind
    step: int
    text: str


class Observer:
    """Finds messages in what a look at a run's files gives; `began`: seconds since 1970, before which nothing is news."""

    def __init__(self, began: float, stalled_seconds: float) -> None:
        self.began, self.stalled_seconds = began, stalled_seconds
        self.is_lost = self.is_stalled = False
        self.place: tuple[int, int, str] | None = None
        self.since = 0.0

    def find(self, seen: Seen, now: float) -> Iterator[Message]:
        """Yield what is new; now: a clock that never goes back, in seconds."""
        for event in seen.events:
            kind = OF_EVENTS.get(str(event.get("event")))
            if kind is not None and (to_seconds(event.get("time")) or 0.0) >= self.began:
                yield message_of(kind, event)
        furthest = max(seen.beats, key=Beat.place, default=None)
        is_lost = seen.state == "lost"
        if is_lost and not self.is_lost:
            yield Message("lost", furthest.step if furthest else 0, "no rank sends a heartbeat")
        self.is_lost = is_lost
        place = None if furthest is None or seen.state != "running" else (*furthest.place(), furthest.phase)
        if place != self.place:
            self.place, self.since, self.is_stalled = place, now, False
        elif (
            place is not None
            and furthest is not None
            and not self.is_stalled
            and now - self.since > self.stalled_seconds
        ):
            self.is_stalled = True
            text = f"no rank is further than {furthest.phase} of step {furthest.step} for {now - self.since:,.0f} s"
            yield Message("stalled", furthest.step, text)


def message_of(kind: Kind, event: dict[str, Any]) -> Message:
    """The message of an event: lost ranks are not any failure, and an end on the way is not the run's."""
    text = next((str(event[key]) for key in ("cause", "error", "name", "reason") if event.get(key)), "")
    if kind == "spike" and isinstance(event.get("sigma"), dict):
        text = ", ".join(f"{name} {value:.1f} sigma above those before" for name, value in event["sigma"].items())
    if kind == "failed" and " is lost (" in text:
        kind = "lost"
    if kind == "done" and event.get("reason") != "finished":
        kind = "stopped"
    return Message(kind, int(event.get("step") or 0), text)


class Notifier:
    """Posts messages of a run to a URL: those that its observer finds."""

    def __init__(self, url: str, name: str, run_dir: Path, observer: Observer) -> None:
        self.url, self.name, self.run_dir, self.observer = url, name, run_dir, observer
        self.host = urlsplit(url).hostname or ""
        self.has_failed = False

    def take(self, seen: Seen) -> None:
        """Post what a look found."""
        for message in self.observer.find(seen, time.monotonic()):
            self.post(message)

    def leave(self, seen: Seen | None) -> None:
        """The launcher ends; what the last look found is posted already."""

    def body(self, message: Message) -> dict[str, Any]:
        """What is posted: the facts, or for Slack only a text."""
        text = f"{self.name}: {message.kind} at step {message.step:,}{': ' if message.text else ''}{message.text}"
        if self.host == SLACK:
            return {"text": text}
        return {
            "run": self.name,
            "dir": str(self.run_dir.absolute()),
            "event": message.kind,
            "step": message.step,
            "text": text,
            "time": round(time.time(), 3),
        }

    def post(self, message: Message) -> None:
        """Post one message; what the URL does not take is said once, without the URL, which may hold a secret."""
        content = json.dumps(self.body(message)).encode()
        request = urllib.request.Request(self.url, content, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=POST_SECONDS):
                pass
        except (OSError, HTTPException, ValueError) as error:
            if not self.has_failed:
                reason = f"status {error.code}" if isinstance(error, urllib.error.HTTPError) else str(error)
                say(
                    f"amfm: warning: launch.notify: {self.host} does not accept messages ({reason}); the run continues without"
                )
            self.has_failed = True


def find_url(config: RunConfig) -> str | None:
    """The URL of `launch.notify`, or of the variable that it names. Raises ValueError for a variable that holds none."""
    url = config.launch.notify
    if url is None or not url.startswith("$"):
        return url
    held = os.environ.get(url[1:], "")
    if not held.startswith(("http://", "https://")):
        raise ValueError(
            f"launch.notify={url}: the variable {url[1:]} holds no http(s) URL here; export it, or give the URL"
        )
    return held


def build_notifier(config: RunConfig) -> Notifier | None:
    """What posts, where the run has a URL. Raises ValueError as `find_url`."""
    url, limit, run_dir = find_url(config), config.launch.heartbeat_seconds, Path(config.run.dir)
    if url is None:
        return None
    observer = Observer(time.time(), STALLED_SECONDS if limit is None else STALLED_SHARE * limit)
    return Notifier(url, config.run.name or run_dir.resolve().name, run_dir, observer)


FOLDER = "exports"  # below the run directory
OUT_OF_THE_WAY = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


class Exporter:
    """Exports checkpoints of every `every_steps` steps to RUN/exports/step-N, each once: what is there is kept."""

    def __init__(self, run_dir: Path, every_steps: int) -> None:
        self.run_dir, self.every_steps = run_dir, every_steps
        self.waiting: deque[str] = deque()
        self.running: tuple[str, subprocess.Popen[str]] | None = None

    def take(self, seen: Seen) -> None:
        """Note checkpoints that a look found, see whether the process has ended, and start the next one."""
        for event in seen.events:
            step = event.get("step")
            if event.get("event") == "checkpoint" and isinstance(step, int) and step % self.every_steps == 0:
                self.waiting.append(checkpoint_name(step))
        if self.running is not None and self.running[1].poll() is not None:
            self.conclude()
        while self.running is None and self.waiting:
            self.start(self.waiting.popleft())

    def start(self, name: str) -> None:
        """Start to export a checkpoint, unless it was exported, or pruned while others were."""
        checkpoint, out = self.run_dir / "checkpoints" / name, self.run_dir / FOLDER / name
        if out.exists() or not checkpoint.is_dir():
            return
        out.parent.mkdir(exist_ok=True)
        process = subprocess.Popen(
            ["nice", "-n", "19", *rank_command(["export", str(checkpoint), str(out)])],
            env=os.environ | OUT_OF_THE_WAY,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.running = name, process

    def conclude(self) -> None:
        """Wait for the process, and say how it ended."""
        assert self.running is not None, "one was started"
        (name, process), self.running = self.running, None
        lines = (process.communicate()[1] or "").strip().splitlines()
        if process.returncode == 0:
            say(f"amfm: exported {name} to {self.run_dir / FOLDER / name}")
        else:
            reason = lines[-1] if lines else f"code {process.returncode}"
            say(f"amfm: warning: {name} was not exported, training continues: {reason}")

    def leave(self, seen: Seen | None) -> None:
        """Export what is left of a run that is finished; else end the process, for the launcher may have to go at once."""
        if seen is not None and seen.state == "finished":
            while self.running is not None or self.waiting:
                if self.running is None:
                    self.start(self.waiting.popleft())
                else:
                    self.conclude()
        elif self.running is not None:
            self.running[1].terminate()
            self.running[1].communicate()


def build_exporter(config: RunConfig) -> Exporter | None:
    """What exports, where the run asks for it."""
    every = config.export.every_steps
    return None if every is None else Exporter(Path(config.run.dir), every)


POLL_SECONDS, LEAVING_SECONDS = 5.0, 20.0


class Follower(Protocol):
    """Is given every look at the run, and the last one again when the launcher ends."""

    def take(self, seen: Seen) -> None:
        """Act on what a look found."""

    def leave(self, seen: Seen | None) -> None:
        """Finish; seen: None if there never was a run to look at."""


@contextmanager
def following(config: RunConfig) -> Iterator[None]:
    """Inside the block, and a moment after it, followers that the configuration asks for see the run. Raises ValueError as they do."""
    built = (build_notifier(config), build_exporter(config))
    followers: list[Follower] = [each for each in built if each is not None]
    if not followers:
        yield
        return
    ended = threading.Event()
    newest: list[Seen] = []

    def work() -> None:
        run: FollowedRun | None = None
        is_last = False
        while not is_last:
            is_last = ended.wait(POLL_SECONDS)
            try:
                run = run or FollowedRun(Path(config.run.dir))
                newest[:] = [run.poll()]
            except (OSError, ValueError):
                continue  # not there yet, being written, or storage that is away: the run itself says so
            for follower in followers:
                follower.take(newest[0])

    thread = threading.Thread(target=work, name="follow-run", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(LEAVING_SECONDS)
        for follower in followers:
            follower.leave(newest[0] if newest else None)


def conclude(run_dir: Path, code: int) -> list[str]:
    """Lines that end a training; none where it continues with other ranks, or before the first step."""
    followed = FollowedRun(run_dir)
    seen = followed.poll()
    if code == NEXT_LAYOUT or not followed.has_steps:
        return []
    record = read_run(run_dir)
    lines = [sum_up(record), judge_run(followed, seen, record).words()]
    saved = newest_saved_step(run_dir)
    place = shlex.quote(str(run_dir))
    if saved >= 0:
        lines.append(f"checkpoint: {run_dir / 'checkpoints' / checkpoint_name(saved)}")
        lines += [f"next: amfm report {place}", f"next: amfm export {place} {shlex.quote(f'{run_dir}-export')}"]
    return [printable(line) for line in lines]


def sum_up(record: RunRecord) -> str:
    """Steps, tokens, time, and the lowest validation loss."""
    use, tokens = measure_goodput(record), record.last("tokens")
    parts = [f"{record.last_step():,} of {record.num_steps:,} steps"]
    if tokens is not None:
        parts.append(f"{count(tokens)} tokens")
    text = ", ".join(parts)
    if use is not None:
        text += f" in {duration(use.held())} ({use.share():.0%} in steps)"
    steps, losses = record.series("validation_loss")
    if losses:
        best = min(range(len(losses)), key=losses.__getitem__)
        text += f"; validation {losses[-1]:.4f}"
        text += ", its best" if losses[best] == losses[-1] else f", best {losses[best]:.4f} at step {steps[best]:,}"
    return text
