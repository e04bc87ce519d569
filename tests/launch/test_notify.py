"""What happens to a run is posted once, as JSON or as Slack wants it; a URL that does not answer is said once and holds nothing up."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from amfm.launch.follow_run import Message, Notifier, Observer, find_url, following
from amfm.pretrain.config.file import load_config
from amfm.pretrain.config.schema import RunConfig
from amfm.pretrain.monitor.beats import Beat
from amfm.pretrain.monitor.follow import Seen, State
from tests.helpers.patience import PATIENCE_SECONDS
from tests.pretrain.config.files import BASE


@contextmanager
def listening(status: int = 200) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A server that keeps what is posted to it, and answers with a status."""
    bodies: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/hook", bodies
    finally:
        server.shutdown()
        server.server_close()


def config_with(folder: Path, url: str) -> RunConfig:
    source = folder / "source.yaml"
    source.write_text(BASE)
    return load_config(source, [f"run.dir={folder}/run", "run.name=mine", f"launch.notify={url}"])


def event(name: str, step: int, **details: Any) -> dict[str, Any]:
    return {"time": "2026-12-01T10:00:00.000+00:00", "event": name, "step": step, **details}


def seen(state: State = "running", events: tuple[dict[str, Any], ...] = (), *beats: Beat) -> Seen:
    return Seen([], list(events), list(beats), state, "")


def test_events_of_a_run_become_messages_and_those_of_earlier_starts_do_not() -> None:
    events = (
        event("start", 0),
        event("spike", 7, sigma={"loss": 8.25}),
        event("failed", 8, error="rank 1 on node-b is lost (last seen at step 8, forward): gloo"),
        event("restarted", 4, cause="rank 1 is gone"),
        event("failed", 9, error="disk full"),
        event("end", 20, reason="stop_after_steps"),
        event("end", 30, reason="finished"),
    )
    began = 1796119200.0  # 2026-12-01 10:00 UTC
    found = list(Observer(began, 300.0).find(seen(events=events), 0.0))
    assert [(message.kind, message.step) for message in found] == [
        ("spike", 7),
        ("lost", 8),
        ("restarted", 4),
        ("failed", 9),
        ("stopped", 20),
        ("done", 30),
    ]
    assert found[0].text == "loss 8.2 sigma above those before" and found[2].text == "rank 1 is gone"
    assert list(Observer(began + 1, 300.0).find(seen(events=events), 0.0)) == []


def test_a_run_that_does_not_move_and_one_without_a_sign_of_life_are_said_once() -> None:
    observer, beat = Observer(0.0, 300.0), Beat(0, "node-a", 5, "validate", 0.0)
    times = [(0.0, "running"), (299.0, "running"), (301.0, "running"), (900.0, "running")]
    found = [[message.kind for message in observer.find(seen(state, (), beat), now)] for now, state in times]
    assert found == [[], [], ["stalled"], []]
    moved = Beat(0, "node-a", 6, "forward", 0.0)
    assert not list(observer.find(seen("running", (), moved), 901.0))
    kinds = [[m.kind for m in observer.find(seen("lost", (), moved), now)] for now in (2000.0, 3000.0)]
    assert kinds == [["lost"], []]


def test_json_is_posted_and_slack_gets_a_text_alone(tmp_path: Path) -> None:
    with listening() as (url, bodies):
        Notifier(url, "mine", tmp_path, Observer(0.0, 300.0)).post(
            Message("spike", 1200, "loss 7.0 sigma above those before")
        )
    (body,) = bodies
    assert body.pop("time") > 0
    assert body == {
        "run": "mine",
        "dir": str(tmp_path),
        "event": "spike",
        "step": 1200,
        "text": "mine: spike at step 1,200: loss 7.0 sigma above those before",
    }
    slack = Notifier("https://hooks.slack.com/services/T0/B0/secret", "mine", tmp_path, Observer(0.0, 300.0))
    assert slack.body(Message("done", 5, "")) == {"text": "mine: done at step 5"}


def test_a_url_that_refuses_or_is_not_there_is_said_once_without_its_path(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with listening(status=500) as (url, bodies):
        notifier = Notifier(url, "mine", tmp_path, Observer(0.0, 300.0))
        for step in range(3):
            notifier.post(Message("spike", step, ""))
    gone = Notifier(url, "mine", tmp_path, Observer(0.0, 300.0))  # nothing listens there any more
    gone.post(Message("done", 1, ""))
    lines = capsys.readouterr().err.splitlines()
    assert len(bodies) == 3 and len(lines) == 2
    assert lines[0].startswith("amfm: warning: launch.notify: 127.0.0.1 does not accept messages (status 500)")
    assert "hook" not in "".join(lines)


def test_what_is_written_down_inside_the_block_is_posted_before_it_is_left(tmp_path: Path) -> None:
    with listening() as (url, bodies):
        config = config_with(tmp_path, url)
        with following(config):
            run = tmp_path / "run"
            run.mkdir()
            later = time.gmtime(time.time() + 2)  # short: a moment written down, nothing waits for it
            line = {"time": time.strftime("%Y-%m-%dT%H:%M:%S+00:00", later)}
            (run / "events.jsonl").write_text(json.dumps(event("end", 3, reason="finished") | line) + "\n")
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not bodies and time.monotonic() < deadline:
            time.sleep(0.05)
    assert [(body["event"], body["step"]) for body in bodies] == [("done", 3)]


def test_a_url_may_be_held_by_a_variable_and_bad_ones_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_with(tmp_path, "$AMFM_TEST_HOOK")
    with pytest.raises(ValueError, match=r"launch.notify=\$AMFM_TEST_HOOK: the variable AMFM_TEST_HOOK holds no http"):
        find_url(config)
    monkeypatch.setenv("AMFM_TEST_HOOK", "https://hooks.slack.com/services/x")
    assert find_url(config) == "https://hooks.slack.com/services/x"
    with pytest.raises(ValueError, match=r"launch.notify"):
        config_with(tmp_path, "ftp://host/x")
