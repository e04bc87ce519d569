"""`amfm report`: a page of a run. What `amfm train --json` sums up."""

from pathlib import Path

from amfm.launch.cli import run
from amfm.launch.commands.train import summarize
from tests.helpers.json_output import one_object
from tests.pretrain.report.test_report import line, make_run


def test_report_writes_a_page(tmp_path, capsys):
    run_dir = make_run(tmp_path, [line(1), line(2)])
    assert run(["report", str(run_dir), "--json"]) == 0
    page = Path(str(one_object(capsys.readouterr().out)["report"]))
    assert page.read_text().startswith("<!doctype html>")
    picture = tmp_path / "curves.png"
    assert run(["report", str(run_dir), "--picture", str(picture), "--json"]) == 0
    assert one_object(capsys.readouterr().out)["picture"] == str(picture) and picture.stat().st_size > 10_000
    assert run(["report", str(run_dir), "--picture", str(tmp_path / "curves.gif")]) == 2
    assert "must end in one of .png, .svg, .pdf; use curves.png" in capsys.readouterr().err
    assert run(["report", str(tmp_path / "none")]) == 2


def test_a_run_whose_log_was_rotated_is_summed_up_by_its_newest_checkpoint(tmp_path):
    run_dir = make_run(tmp_path, [line(1), line(2)])
    before = summarize(str(run_dir))
    assert (before["step"], before["loss"]) == (2, line(2)["loss"])
    (run_dir / "metrics.jsonl").rename(run_dir / "metrics.jsonl.1")
    for step in (2, 10_000_000):
        (run_dir / f"checkpoints/step-{step:08d}").mkdir(parents=True)
        found = summarize(str(run_dir))
        assert (found["step"], found["finished"], found["loss"]) == (step, step > 2, None)
