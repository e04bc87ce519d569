"""The verdict on a directory: what its state, time, ranks and disk add to the rules on its logs."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from amfm.launch.cli import run
from amfm.pretrain.checkpoint.manifest_file import checkpoint_name
from amfm.pretrain.monitor.follow import FollowedRun
from amfm.pretrain.report.report import write_report
from amfm.pretrain.report.verdict import Verdicts, judge
from tests.helpers.json_output import one_object
from tests.pretrain.monitor.test_follow import age, append, beat
from tests.pretrain.report.test_report import brief, line, make_run

Lines = list[dict[str, Any]]


def at(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat()


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run with 40 steps that began an hour ago and is alive."""
    began = time.time() - 3600
    told = {"grad_norm": 1.0, "expert_load": {}, "skipped": False, "seconds": 80.0}
    steps = [brief(step, time=began + 85 * step, **told) for step in range(1, 41)]
    folder = make_run(tmp_path, steps)
    append(
        folder / "events.jsonl",
        {"event": "start", "step": 0, "time": at(began), "world_size": 2, "hosts": {"node-a": "0-1"}},
    )
    beat(folder, rank=0)
    beat(folder, rank=1)
    return folder


def findings(run_dir: Path) -> dict[str, str]:
    followed = FollowedRun(run_dir)
    verdict = Verdicts(followed).of(followed.poll())
    assert verdict is not None
    return {finding.rule: finding.text for finding in verdict.findings}


def test_a_run_that_is_alive_with_all_its_ranks_is_well(run_dir: Path) -> None:
    assert findings(run_dir) == {}


def test_ranks_that_are_silent_or_never_spoke_are_named(run_dir: Path) -> None:
    beat(run_dir, rank=1, seen=time.time() - 600, step=7)
    assert findings(run_dir) == {"ranks": "rank 1 on node-a is lost (last seen at step 7, forward)"}
    (run_dir / "heartbeats" / "rank-1.json").unlink()
    assert findings(run_dir) == {"ranks": "1 rank of 2 has no heartbeat"}


def test_time_that_trained_nothing_is_named_with_its_use(run_dir: Path) -> None:
    lines = [json.loads(text) for text in (run_dir / "metrics.jsonl").read_text().splitlines()]
    for each in lines:
        each["seconds"] = 20.0
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    assert findings(run_dir) == {"goodput": "24% of 57 min trained what counts: 42 min went to other"}


def test_a_disk_without_room_for_another_checkpoint_is_named(run_dir: Path) -> None:
    append(run_dir / "events.jsonl", {"event": "checkpoint", "step": 40, "time": at(time.time())})
    saved = run_dir / "checkpoints" / checkpoint_name(40)
    saved.mkdir(parents=True)
    with (saved / "weights").open("wb") as file:
        file.truncate(10**13)  # a hole, of more than is free
    found = findings(run_dir)
    assert found["disk"].endswith("are free, and a checkpoint needs 10000.0 GB") and len(found) == 1


@pytest.mark.parametrize("state", ["failed", "lost"])
def test_a_run_that_ended_badly_is_red_and_its_cause_comes_first(run_dir: Path, state: str) -> None:
    for rank in (0, 1):
        (run_dir / "heartbeats" / f"rank-{rank}.json").unlink()
    if state == "failed":
        append(
            run_dir / "events.jsonl", {"event": "failed", "step": 40, "time": at(time.time()), "error": "NCCL timeout"}
        )
    age(run_dir)
    texts = list(findings(run_dir).values())
    assert texts[0] == {"failed": "failed: NCCL timeout", "lost": "lost: no rank sends a heartbeat"}[state]
    page = write_report([run_dir]).read_text()
    cause = ", NCCL timeout" if state == "failed" else ""
    assert f'<span class="state bad">{state}: step 40 of 100{cause}</span>' in page


@pytest.mark.parametrize("is_saved", [True, False])
def test_a_run_whose_last_step_is_saved_is_finished_also_where_no_event_says_so(run_dir: Path, is_saved: bool) -> None:
    steps = [line(step, expert_load={}, skipped=False, time=time.time()) for step in range(41, 101)]
    append(run_dir / "metrics.jsonl", *steps)
    append(run_dir / "events.jsonl", {"event": "checkpoint", "step": 100 if is_saved else 80, "time": at(time.time())})
    for rank in (0, 1):
        (run_dir / "heartbeats" / f"rank-{rank}.json").unlink()
    age(run_dir)
    assert ("state" in findings(run_dir)) != is_saved
    page = write_report([run_dir]).read_text()
    assert ("lost: step 100 of 100" in page) != is_saved and ('"state done">finished<' in page) == is_saved


def test_a_verdict_is_kept_until_the_state_changes_or_its_time_is_over(run_dir: Path) -> None:
    followed = FollowedRun(run_dir)
    verdicts = Verdicts(followed)
    first = verdicts.of(followed.poll())
    assert verdicts.of(followed.poll()) is first
    append(run_dir / "events.jsonl", {"event": "end", "step": 40, "time": at(time.time()), "reason": "finished"})
    for rank in (0, 1):
        (run_dir / "heartbeats" / f"rank-{rank}.json").unlink()
    assert verdicts.of(followed.poll()) is not first


def lines(number: int = 400, **newest: object) -> Lines:
    """A loss that falls, and in the newest ten steps other values."""
    return [brief(step, loss=4 + 1 / step, grad_norm=1.0, skipped=False) for step in range(1, number - 9)] + [
        brief(step, **{"loss": 4 + 1 / step, "grad_norm": 1.0, "skipped": False, **newest})
        for step in range(number - 9, number + 1)
    ]


SICK: dict[str, tuple[Lines, Lines, str]] = {
    "skips": (lines(skipped=True), [], "10 of the newest 10 steps were skipped"),
    "skips before": (
        [brief(step, loss=4.0, grad_norm=1.0) for step in range(1, 401)],
        [{"event": "skipped_step", "step": step} for step in (7, 7, 9)],
        "2 of 400 steps were skipped",
    ),
    "spikes": (lines(spike={"loss": 7.0}), [], "10 of the newest 10 steps are far above those before"),
    "not finite": (lines(loss=None), [], "the newest loss is not finite"),
    "loss": (lines(loss=4.6), [], "the loss is 15% above its lowest (4.003 at step 390)"),
    "gradients": (lines(grad_norm=6.0), [], "the gradient norm is 6.0 times its median over the run"),
    "pace": (lines(seconds=1.0), [], "a step is 2.0 times its median over the run"),
    "experts": (
        lines(),
        [{"event": "experts_collapsed", "step": 7, "token_share": {"9": 1.0}}],
        "routing collapsed in block 9 at step 7",
    ),
    "rollbacks": (lines(), [{"event": "rolled_back", "step": 7}], "1 rollback after spikes"),
    "failures": (lines(), [{"event": "start"}, {"event": "start"}, {"event": "failed"}], "2 failures"),
    "storage": (lines(), [{"event": "checkpoint", "remarks": ["not copied"]}], "the newest checkpoint: not copied"),
    "slow ranks": (lines(), [{"event": "start"}, {"event": "stragglers"}], "slow ranks since the newest start"),
}


@pytest.mark.parametrize(("metrics", "events", "words"), SICK.values(), ids=SICK)
def test_a_sick_run_needs_a_look_for_one_reason(metrics: Lines, events: Lines, words: str) -> None:
    verdict = judge(metrics, events)
    assert [finding.text for finding in verdict.findings] == [words]
    assert verdict.words() == f"needs a look: {words}" and all(finding.remedy for finding in verdict.findings)
    assert (Path(__file__).parents[3] / verdict.findings[0].page).is_file()


def test_a_healthy_run_is_well_also_where_it_is_short_or_was_slow_before() -> None:
    past = [
        {"event": "start"},
        {"event": "stragglers"},
        {"event": "signal"},
        {"event": "start"},
        {"event": "checkpoint"},
    ]
    for metrics in (lines(), lines()[:3], [], lines(loss=4.1)):
        assert judge(metrics, past).words() == "well"


def test_report_and_watch_show_the_same_words(tmp_path: Path, capsys) -> None:
    run_dir = make_run(tmp_path, lines(loss=4.6, expert_load={}))
    (run_dir / "events.jsonl").write_text(2 * (json.dumps({"event": "start", "step": 0}) + "\n"))
    run(["watch", str(run_dir), "--json"])
    health = one_object(capsys.readouterr().out)["health"]
    texts = [finding["text"] for finding in health["findings"]]
    assert health["level"] == "needs a look" and texts[1:] == ["1 failure"] and "15% above" in texts[0]
    page = write_report([run_dir]).read_text()
    assert all(text in page for text in ["needs a look", *texts]) and "docs/debugging.md" in page
