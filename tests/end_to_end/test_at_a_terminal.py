"""The first hours of a user at a terminal: a mistyped path, Ctrl-C, the same command again, and a run that is extended."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.terminal import CTRL_C, Terminal


@pytest.mark.slow
def test_a_run_is_interrupted_finished_and_extended_without_a_loss_or_a_surprise(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"

    def train(steps: int, config: str = "configs/probes/mqar.yaml") -> Terminal:
        keys = [f"run.dir={run_dir}", f"train.steps={steps}", "train.micro_batch_size=16"]
        keys += ["train.validate_every_steps=null", "train.checkpoint_every_steps=4"]
        return Terminal("train", config, *keys, "schedule.warmup_steps=2", "schedule.decay_steps=4")

    mistyped = train(12, "configs/probes/mqa.yaml")
    assert mistyped.end() == 2 and "did you mean configs/probes/mqar.yaml?" in mistyped.screen

    interrupted = train(12)
    interrupted.wait_for_lines(run_dir / "metrics.jsonl", 3)
    interrupted.type(CTRL_C)
    interrupted.expect("stopping after this step and saving; Ctrl-C again ends now")
    assert interrupted.end() == 130 and "the same command" in interrupted.screen
    finished = train(12)
    assert finished.end() == 0 and "finished at step 12 of 12" in finished.screen
    again = train(12)
    assert again.end() == 0 and "already finished: to continue, raise train.steps" in again.screen

    extended = train(16)
    extended.expect("the schedule raises the learning rate again: step 13 runs at")
    extended.expect("To keep the rate low")
    extended.type(CTRL_C)
    extended.end()
    told = re.search(r"amfm rollback (\S+) --to (\d+)\.", extended.screen)
    assert told is not None, extended.screen
    gone_back = Terminal("rollback", told[1], "--to", told[2])
    assert gone_back.end() == 0 and "--undo 1" in gone_back.screen
    goes_on = train(16)
    assert goes_on.end() == 0 and "finished at step 16 of 16" in goes_on.screen
    assert "raises the learning rate" not in goes_on.screen and int(told[2]) == 8
