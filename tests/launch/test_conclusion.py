"""What the last lines of a training say."""

from pathlib import Path

from amfm.launch.follow_run import conclude
from amfm.pretrain.launcher_protocol import DONE, NEXT_LAYOUT
from tests.pretrain.report.test_report import line, make_run


def test_the_end_names_steps_time_best_validation_verdict_checkpoint_and_the_next_commands(tmp_path: Path) -> None:
    lines = [line(1, validation_loss=3.0, time=1e9 + 1), line(2, validation_loss=3.5, time=1e9 + 2)]
    run_dir = make_run(tmp_path, lines, "train.steps=2")
    (run_dir / "events.jsonl").write_text('{"event": "start", "step": 0, "time": "2001-09-09T01:46:40+00:00"}\n')
    assert conclude(run_dir, DONE) == [
        "2 of 2 steps, 1.02k tokens in 2.0 s (50% in steps); validation 3.5000, best 3.0000 at step 1",
        "well",
    ]
    (run_dir / "checkpoints/step-00000002").mkdir(parents=True)
    saved, *following = conclude(run_dir, DONE)[2:]
    assert saved == f"checkpoint: {run_dir}/checkpoints/step-00000002"
    assert following == [f"next: amfm report {run_dir}", f"next: amfm export {run_dir} {run_dir}-export"]


def test_nothing_is_said_where_training_goes_on_or_has_no_step(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path, [line(1)])
    assert conclude(run_dir, NEXT_LAYOUT) == []
    (run_dir / "metrics.jsonl").write_text("")
    assert conclude(run_dir, DONE) == []
