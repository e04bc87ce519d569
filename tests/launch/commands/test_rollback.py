"""`amfm rollback`: back, forward, and what is there."""

from pathlib import Path

from amfm.launch.cli import run
from amfm.pretrain.monitor.ownership import lock_directory
from tests.helpers.json_output import one_object
from tests.pretrain.checkpoint.test_remote import save_by_hand
from tests.pretrain.report.test_report import line, make_run


def test_rollback_goes_back_and_forward_and_lists_what_there_is(tmp_path, capsys):
    run_dir = make_run(tmp_path, [line(step) for step in range(1, 7)])
    for step in (2, 4, 6):
        save_by_hand(run_dir / f"checkpoints/step-0000000{step}", step)

    def steps_after(*arguments: str) -> list[int]:
        assert run(["rollback", str(run_dir), *arguments, "--json"]) == 0
        return [row["step"] for row in one_object(capsys.readouterr().out)["steps"]]

    assert steps_after() == [2, 4, 6]
    assert run(["rollback", str(run_dir), "--to", "4"]) == 0
    shown = capsys.readouterr().out
    assert f"{run_dir} continues from step 4" in shown and f"amfm rollback {run_dir} --undo 1" in shown
    assert steps_after() == [2, 4] and steps_after("--undo", "1") == [2, 4, 6]
    assert run(["rollback", str(run_dir), "--to", "5"]) == 2
    assert "there is no checkpoint of step 5" in capsys.readouterr().err
    assert run(["rollback", str(run_dir), "--to", "2", "--undo", "1"]) == 2
    assert run(["rollback", str(tmp_path)]) == 2
    assert "holds no config.yaml, so it is not a run directory" in capsys.readouterr().err


def test_a_run_that_trains_is_not_rolled_back(tmp_path: Path, capsys) -> None:
    run_dir = make_run(tmp_path, [line(1)])
    save_by_hand(run_dir / "checkpoints/step-00000001", 1)
    with lock_directory(run_dir):
        assert run(["rollback", str(run_dir), "--to", "1"]) == 3
    assert "another process trains in" in capsys.readouterr().err
