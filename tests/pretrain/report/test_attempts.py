"""Which start did which step: through resumes, rollbacks and what was brought back."""

import json
from pathlib import Path

from amfm.launch.cli import run
from amfm.pretrain.report.data import list_attempts
from amfm.pretrain.report.report import write_report
from amfm.pretrain.startup.log import in_ranges
from tests.helpers.json_output import one_object
from tests.pretrain.report.test_report import line, make_run


def begin(step: int, discarded: int = 0, **more: object) -> dict[str, object]:
    return {"event": "start", "step": step, "discarded_steps": discarded, **more}


def test_a_resume_and_a_rollback_take_steps_away_and_forward_brings_them_back() -> None:
    events = [
        begin(0),
        {"event": "checkpoint", "step": 20},
        begin(20, discarded=7),
        {"event": "rolled_back_to", "step": 10, "number": 1, "discarded_steps": 30},
        begin(10),
    ]
    first, second, third = list_attempts(events, newest_step=15)
    assert (first.first_step, first.last_step, first.kept) == (1, 27, [(1, 10)])
    assert (second.first_step, second.last_step, second.kept) == (21, 40, [])
    assert third.kept == [(11, 15)]
    assert [attempt.number for attempt in (first, second, third) if attempt.did(15)] == [1, 3]
    forward = [
        {"event": "rolled_back_to", "step": 10, "number": 2, "discarded_steps": 5},
        {"event": "rolled_forward", "step": 40, "number": 1},
    ]
    first, second, third = list_attempts([*events, *forward], newest_step=40)
    assert (first.kept, second.kept, third.kept) == ([(1, 10), (11, 20)], [(21, 40)], [])
    assert third.last_step == 15 and second.keeps(21) and not first.keeps(21)


def test_a_step_is_traced_to_hosts_job_code_and_settings(tmp_path: Path, capsys) -> None:
    run_dir = make_run(tmp_path, [line(step) for step in range(1, 31)])
    where = [
        {"hosts": {f"bad{number}": str(number) for number in range(6)}, "job": {"SLURM_JOB_ID": "7"}, "code": "abc"},
        {
            "hosts": {"good": "0-7"},
            "job": {},
            "code": "def",
            "config": "starts/config-0.yaml",
            "versions": {"torch": "2"},
        },
    ]
    events = [begin(0, **where[0]), begin(20, discarded=5, **where[1])]
    (run_dir / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    assert run(["inspect", str(run_dir), "--step", "23", "--json"]) == 0
    old, new = one_object(capsys.readouterr().out)["starts"]
    assert (old["is_kept"], old["job"], old["steps"]) == (False, {"SLURM_JOB_ID": "7"}, [1, 25])
    assert (new["is_kept"], new["hosts"], new["config"]) == (True, {"good": "0-7"}, "starts/config-0.yaml")
    assert run(["inspect", str(run_dir), "--step", "23"]) == 0
    shown = capsys.readouterr().out
    assert f"Step 23 of {run_dir}, given up later" in shown and "bad3 (3) and 2 more" in shown and "good (0-7)" in shown
    assert run(["inspect", str(run_dir), "--step", "31"]) == 2
    assert "no start of" in capsys.readouterr().err
    page = write_report([run_dir]).read_text()
    assert "<h2>Starts</h2>" in page and "SLURM_JOB_ID=7" in page and "starts/config-0.yaml" in page


def test_ranks_in_short() -> None:
    assert [in_ranges(ranks) for ranks in ([0], [0, 1, 2, 5], [1, 3, 4])] == ["0", "0-2,5", "1,3-4"]
