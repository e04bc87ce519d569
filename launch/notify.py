"""Tells a URL what happens to a run (`launch.notify`): lost, restarted, spike, stalled, done, and how else it ended.

A thread of the launcher (follow_run.py) posts JSON. It asks nothing of the ranks and holds nothing up: a URL that does not answer is
said once, and each message is tried once.
"""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from amfm.launch.console import say
from amfm.pretrain.config.schema import RunConfig
from amfm.pretrain.monitor.beats import Beat
from amfm.pretrain.monitor.follow import Seen, to_seconds

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
