"""The verdict on a run: each rule on a sick and a healthy run, and the same words on every screen."""

import json
from pathlib import Path
from typing import Any

import pytest

from amfm.launch.cli import run
from amfm.pretrain.monitor.health import judge
from amfm.pretrain.report.report import write_report
from tests.helpers.json_output import one_object
from tests.pretrain.report.test_report import line, make_run

Lines = list[dict[str, Any]]


def lines(number: int = 400, **newest: object) -> Lines:
    """A loss that falls, and in the newest ten steps other values."""
    return [line(step, loss=4 + 1 / step, grad_norm=1.0, skipped=False) for step in range(1, number - 9)] + [
        line(step, **{"loss": 4 + 1 / step, "grad_norm": 1.0, "skipped": False, **newest})
        for step in range(number - 9, number + 1)
    ]


SICK: dict[str, tuple[Lines, Lines, str]] = {
    "skips": (lines(skipped=True), [], "10 of the newest 10 steps were skipped"),
    "skips before": (
        [line(step, loss=4.0, grad_norm=1.0) for step in range(1, 401)],
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
