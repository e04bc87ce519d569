"""The verb watch: what it prints in a log and as JSON, and its exit codes."""

import json
import time
from pathlib import Path

from amfm.launch.cli import run as amfm
from tests.pretrain.monitor.test_display import metrics_of
from tests.pretrain.monitor.test_follow import append, beat, event
from tests.pretrain.monitor.test_follow import run as started_run

__all__ = ["started_run"]


def test_a_run_that_ended_is_shown_once_and_said_so(started_run: Path, capsys) -> None:
    (started_run / "heartbeats" / "rank-0.json").unlink()
    append(started_run / "metrics.jsonl", metrics_of(20))
    append(started_run / "events.jsonl", event("end", 20, reason="finished"))
    assert amfm(["watch", str(started_run)]) == 0
    said = capsys.readouterr().err
    assert "step 20/20, loss 5.5000" in said
    assert f"{started_run}: finished" in said


def test_events_give_the_terminal_no_orders(started_run: Path, capsys) -> None:
    (started_run / "heartbeats" / "rank-0.json").unlink()
    append(started_run / "events.jsonl", event("failed", 1, error="\x1b]0;title\x07\x1b[2J"))
    assert amfm(["watch", str(started_run)]) == 3
    said = capsys.readouterr().err
    assert "\x1b" not in said and "\\x1b]0;title\\x07" in said


def test_json_is_the_state_of_now_and_a_failed_run_is_exit_code_3(started_run: Path, capsys) -> None:
    (started_run / "heartbeats" / "rank-0.json").unlink()
    append(started_run / "events.jsonl", event("gave_up", 1, cause="5 steps in a row were skipped"))
    assert amfm(["watch", str(started_run), "--json"]) == 3
    found = json.loads(capsys.readouterr().out)
    assert (found["state"], found["cause"]) == ("failed", "5 steps in a row were skipped")
    beat(started_run, phase="start", seen=time.time())
    assert amfm(["watch", str(started_run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["state"] == "running"


def test_the_verdict_is_printed_and_is_an_exit_code_where_that_is_asked_for(started_run: Path, capsys) -> None:
    (started_run / "heartbeats" / "rank-0.json").unlink()
    append(started_run / "metrics.jsonl", *(metrics_of(step) for step in range(2, 21)))
    append(started_run / "events.jsonl", event("start", 1), event("end", 20, reason="finished"))
    assert amfm(["watch", str(started_run)]) == 0
    assert f"{started_run}: needs a look: 1 failure" in capsys.readouterr().err
    assert amfm(["watch", str(started_run), "--strict"]) == 3
    (started_run / "events.jsonl").write_text(json.dumps(event("start", 0)) + "\n")
    append(started_run / "events.jsonl", event("end", 20, reason="finished"))
    capsys.readouterr()
    assert amfm(["watch", str(started_run), "--strict"]) == 0
    assert f"{started_run}: well" in capsys.readouterr().err


def test_no_such_run_is_bad_input(tmp_path: Path, capsys) -> None:
    assert amfm(["watch", str(tmp_path / "none")]) == 2
    assert "is not a run directory" in capsys.readouterr().err
