"""The verb runs: a table of the runs of a folder, as a table and as JSON."""

from pathlib import Path

import pytest

from amfm.launch.cli import run as amfm
from tests.helpers.json_output import one_object
from tests.pretrain.report.test_report import line, make_run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three runs: one that ended, a better one that was killed and is deeper, and one without a step."""
    for place, losses in (("ended", (3.0, 2.9)), ("deep/killed", (2.5, 2.7))):
        (tmp_path / place).mkdir(parents=True)
        lines = [
            line(step, expert_load={}, skipped=False, time=1e9 + step, validation_loss=loss)
            for step, loss in enumerate(losses, 1)
        ]
        make_run(tmp_path / place, lines, "train.steps=2" if place == "ended" else "train.steps=50")
    (tmp_path / "ended/run/events.jsonl").write_text(
        '{"event": "start", "step": 0, "time": "2001-09-09T01:46:40+00:00"}\n'
        '{"event": "end", "step": 2, "time": "2001-09-09T01:46:44+00:00", "reason": "finished"}\n'
    )
    empty = tmp_path / "new"
    empty.mkdir()
    (empty / "config.yaml").write_text((tmp_path / "ended/run/config.yaml").read_text())
    (empty / "events.jsonl").write_text("")
    return tmp_path


def test_every_run_of_a_folder_is_a_row_and_those_without_a_value_come_last(folder: Path, capsys) -> None:
    assert amfm(["runs", str(folder), "--sort", "best", "--json"]) == 0
    found = one_object(capsys.readouterr().out)
    assert [row["run"] for row in found["runs"]] == ["deep/killed/run", "ended/run", "new"] and found["damaged"] == []
    killed, ended, new = found["runs"]
    assert (killed["best"], killed["best_step"], killed["loss"], killed["state"]) == (2.5, 1, 4.0, "unfinished")
    assert (ended["state"], ended["step"], ended["steps"], ended["health"]) == ("finished", 2, 2, "well")
    assert (ended["last_event"], ended["last_time"]) == ("end", 1e9 + 4)
    assert (new["step"], new["steps"], new["loss"], new["health"]) == (0, 2, None, "-")
    assert amfm(["runs", str(folder), "--sort", "best", "--reverse", "--json"]) == 0
    assert [row["run"] for row in one_object(capsys.readouterr().out)["runs"]] == [
        "ended/run",
        "deep/killed/run",
        "new",
    ]


def test_the_table_has_the_words_of_the_report(folder: Path, capsys) -> None:
    assert amfm(["runs", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert "2 of 50" in shown and "2.5000 at 1" in shown and "well" in shown and "3 runs of" in shown


def test_a_damaged_run_is_named_and_hides_no_other(folder: Path, capsys) -> None:
    (folder / "deep/killed/run/config.yaml").write_text("model: [")
    assert amfm(["runs", str(folder), "--json"]) == 0
    output = capsys.readouterr()
    found = one_object(output.out)
    assert [row["run"] for row in found["runs"]] == ["ended/run", "new"]
    assert found["damaged"][0]["run"] == "deep/killed/run" and "deep/killed/run cannot be read" in output.err


def test_a_folder_without_runs_or_no_folder_is_bad_input(tmp_path: Path, capsys) -> None:
    assert amfm(["runs", str(tmp_path)]) == 2 and "holds no run directory" in capsys.readouterr().err
    assert amfm(["runs", str(tmp_path / "none")]) == 2 and "is not a folder" in capsys.readouterr().err
