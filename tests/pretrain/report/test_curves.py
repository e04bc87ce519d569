"""What happened to a run is marked by kind, all of it; and its stages are shaded."""

import json
from pathlib import Path

from amfm.pretrain.report.curves import SPANS
from amfm.pretrain.report.data import read_run
from amfm.pretrain.report.plots import make_plots
from amfm.pretrain.report.report import write_report
from tests.pretrain.report.test_report import brief, data_of, make_run


def test_all_events_are_marked_by_kind_and_near_ones_gathered(tmp_path: Path) -> None:
    run = make_run(tmp_path, [brief(step) for step in range(1, 2001)], "train.steps=2000")
    events = [{"event": "skipped_step", "step": step} for step in range(2, 2000, 2)]
    events += [
        {"event": "failed", "step": 1000},
        {"event": "start", "step": 990},
        {"event": "checkpoint", "step": 1000},
    ]
    (run / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    marks = make_plots(read_run(run))[0].marks
    by_kind = {kind: [mark for mark in marks if mark.kind == kind] for kind in ("failure", "trouble", "other")}
    assert [(mark.step, mark.text) for mark in by_kind["failure"]] == [(1000, "failed")]
    assert [(mark.step, mark.text) for mark in by_kind["other"]] == [(990, "start")]
    assert len(by_kind["trouble"]) == SPANS and sum(mark.number for mark in by_kind["trouble"]) == 999


def test_stages_that_the_run_came_to_are_shaded_and_the_newest_is_named(tmp_path: Path) -> None:
    stages = ", ".join(f'{{"name": "{name}", "tokens": 51200}}' for name in ("warm", "main", "end"))
    run = make_run(tmp_path, [brief(step) for step in range(1, 131)], "train.steps=null", f"stages=[{stages}]")
    last = read_run(run).stages[0].last_step
    page = write_report([run]).read_text()
    assert data_of(page)["runs"][0]["stages"] == [[1, last, "warm"], [last + 1, 130, "main"]]
    assert f'<div class="value">main</div><div class="detail">2 of 3, ends at step {2 * last}<' in page
