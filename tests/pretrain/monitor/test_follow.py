"""A run is watched from outside only by its files, while it writes them, after it ended and after it died."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from amfm.pretrain.config.file import load_config, resolved_yaml
from amfm.pretrain.monitor.beats import Beat
from amfm.pretrain.monitor.follow import FollowedRun, GrowingFile
from tests.pretrain.monitor.test_display import metrics_of


def append(path: Path, *records: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def event(name: str, step: int, /, **more: Any) -> dict[str, Any]:
    return {"time": datetime.now(UTC).isoformat(), "event": name, "step": step, **more}


def beat(run: Path, *, rank: int = 0, seen: float | None = None, phase: str = "forward", step: int = 1) -> None:
    (run / "heartbeats").mkdir(exist_ok=True)
    content = asdict(Beat(rank, "node-a", step, phase, time.time() if seen is None else seen))
    (run / "heartbeats" / f"rank-{rank}.json").write_text(json.dumps(content))


def age(run: Path) -> None:
    """Let all files be as old as those of a run that died a minute ago."""
    for path in run.iterdir():
        os.utime(path, (time.time() - 60,) * 2)


@pytest.fixture
def run(base: Path, tmp_path: Path) -> Path:
    """A run of 20 steps that has begun, with one step done."""
    folder = tmp_path / "my-run"
    folder.mkdir()
    (folder / "config.yaml").write_text(resolved_yaml(load_config(base, ["train.steps=20"])))
    append(folder / "events.jsonl", event("start", 0))
    append(folder / "metrics.jsonl", metrics_of(1))
    beat(folder)
    return folder


def test_a_living_run_is_shown_with_its_step_ranks_and_checkpoint(run: Path) -> None:
    append(run / "events.jsonl", event("checkpoint", 1))
    beat(run, rank=1)
    followed = FollowedRun(run)
    seen = followed.poll()
    assert seen.state == "running"
    assert followed.panel.last_step == 20
    assert followed.panel.status == "running: 2 ranks on 1 host, at step 1, forward"
    assert followed.panel.describe_checkpoint().startswith("checkpoint of step 1, ")
    found = followed.to_json(seen)
    assert (found["step"], found["steps"], found["checkpoint_step"]) == (1, 20, 1)
    assert [rank["host"] for rank in found["ranks"]] == ["node-a", "node-a"]


def test_a_line_counts_when_it_is_whole_and_once(run: Path) -> None:
    followed = FollowedRun(run)
    followed.poll()
    whole = json.dumps(metrics_of(2)) + "\n"
    with (run / "metrics.jsonl").open("a") as file:
        file.write(whole[:40])
        file.flush()
        assert followed.poll().metrics == []
        file.write(whole[40:])
    assert [line["step"] for line in followed.poll().metrics] == [2]
    assert followed.poll().metrics == []


def test_a_run_that_resumes_replaces_its_lines_and_is_read_anew(run: Path) -> None:
    append(run / "metrics.jsonl", metrics_of(2), metrics_of(3))
    followed = FollowedRun(run)
    followed.poll()
    kept = run / "metrics.tmp"
    append(kept, metrics_of(1), metrics_of(2, loss=4.0))
    os.replace(kept, run / "metrics.jsonl")
    assert [line["step"] for line in followed.poll().metrics] == [1, 2]
    assert list(followed.panel.curves["loss"]) == [5.5, 4.0]


def test_a_long_file_is_read_from_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("amfm.pretrain.monitor.follow.FIRST_BYTES", 100)
    append(tmp_path / "x.jsonl", *({"step": step} for step in range(1000)))
    _, lines = GrowingFile(tmp_path / "x.jsonl").read()
    assert lines[-1] == {"step": 999} and 3 < len(lines) < 10


def test_a_run_ends_as_its_events_say(run: Path) -> None:
    followed = FollowedRun(run)
    assert followed.poll().state == "running"
    (run / "heartbeats" / "rank-0.json").unlink()
    append(run / "events.jsonl", event("failed", 1, error="the disk is full"))
    assert followed.poll().state == "failed"
    assert followed.panel.status == "failed: the disk is full"
    append(run / "events.jsonl", event("start", 1), event("signal", 2, name="SIGINT"))
    assert followed.poll().state == "stopped"
    append(run / "events.jsonl", event("start", 2), event("end", 20, reason="finished"))
    assert followed.poll().state == "finished"


def test_a_run_that_died_is_gone_and_says_where_it_resumes(run: Path) -> None:
    append(run / "events.jsonl", event("checkpoint", 1))
    beat(run, seen=time.time() - 60)
    age(run)
    followed = FollowedRun(run)
    assert followed.poll().state == "lost"
    assert "rank 0 on node-a is lost (last seen at step 1, forward)" in followed.panel.status
    assert "resumes from checkpoint of step 1" in followed.panel.status
    beat(run, seen=time.time() - 59)
    assert followed.poll().state == "running", "a beat that changes is a living run, whatever its clock says"


def test_a_start_that_was_just_written_down_is_no_dead_run(run: Path) -> None:
    beat(run, seen=time.time() - 60)
    append(run / "events.jsonl", event("start", 1))
    assert FollowedRun(run).poll().state == "running"
    (run / "heartbeats" / "rank-0.json").unlink()
    followed = FollowedRun(run)
    assert followed.poll().state == "running"
    assert followed.panel.status == "running: it starts, or ends"


def test_between_two_layouts_a_run_is_waited_for(run: Path) -> None:
    (run / "heartbeats" / "rank-0.json").unlink()
    append(run / "events.jsonl", event("next_layout", 10, stage="long"))
    age(run)
    followed = FollowedRun(run)
    assert followed.poll().state == "waiting"
    assert followed.panel.status == "saved: stage long has another layout, its ranks restart"
    append(run / "events.jsonl", event("start", 10))
    beat(run)
    assert followed.poll().state == "running"


def test_the_next_start_is_seen_before_it_has_written_anything(run: Path) -> None:
    append(run / "events.jsonl", event("failed", 1, error="lost a rank"))
    beat(run, phase="start")
    assert FollowedRun(run).poll().state == "running"


def test_lines_of_another_version_are_left_out(run: Path) -> None:
    append(run / "metrics.jsonl", {"step": 2}, {"step": "x", "loss": []}, {"event": None})
    append(run / "events.jsonl", {"event": 7}, {"event": "checkpoint", "step": None})
    followed = FollowedRun(run)
    assert [line["step"] for line in followed.poll().metrics] == [1]


def test_a_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"is not a run directory; give run\.dir of a run that was started"):
        FollowedRun(tmp_path)


def test_the_configuration_is_the_one_of_the_last_of_many_starts(run: Path) -> None:
    append(run / "events.jsonl", *(event("start", step) for step in range(2000)))
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("steps: 20", "steps: 30"))
    followed = FollowedRun(run)
    followed.poll()
    assert followed.panel.last_step == 30 and followed.config is not None
    assert followed.panel.first_step == 1999
