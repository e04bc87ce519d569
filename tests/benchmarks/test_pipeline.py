"""`python -m benchmarks.pipeline`: both schedules train, in turns, and bad input is rejected."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from benchmarks.command import run
from benchmarks.pipeline import SCHEDULES, load_stages, pipeline
from tests.helpers.patience import PATIENCE_SECONDS


@pytest.mark.slow
def test_two_schedules_take_turns_and_their_ratio_is_of_neighbours() -> None:
    sizes = ["model.pattern=M*E-", "train.sequence_length=32"]
    command = [sys.executable, "-m", "benchmarks.pipeline", "--rounds", "2", "--json", *sizes]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, timeout=PATIENCE_SECONDS).stdout)
    whole, cut = (found["seconds"][schedule] for schedule in SCHEDULES)
    assert len(whole) == len(cut) == 2 and found["stages"] == 2 and found["micro_batches"] == 8
    ratios = sorted(b / a for a, b in zip(whole, cut))
    assert [found["ratio"]["lowest"], found["ratio"]["highest"]] == pytest.approx(ratios)


def test_a_pipeline_of_one_stage_and_settings_that_it_cannot_have_are_refused(capsys: pytest.CaptureFixture) -> None:
    assert load_stages([], 2).parallel.pipeline == 2
    assert run(pipeline, ["--nproc", "1"]) == 2
    assert "--nproc 1: a pipeline has two stages at least" in capsys.readouterr().err
    assert run(pipeline, ["train.recompute=full"]) == 2
    assert "train.recompute" in capsys.readouterr().err
