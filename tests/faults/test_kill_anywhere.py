"""kill -9 at random moments of real runs, starting, stepping and saving: every end is that of a run never killed."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from amfm.data_pipeline.config import DataConfig
from amfm.pretrain.checkpoint.inspect import diff_checkpoints
from tests.faults.attempt import Attempt
from tests.helpers.spawn import run_ranks
from tests.pretrain.tiny_run import read_events, tiny_data

STEPS = 14


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    return tiny_data(tmp_path_factory.mktemp("data"))


def count_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def list_resumed(run_dir: Path) -> list[str]:
    """Checkpoints from which the starts of a run continued; some were killed before they wrote a line."""
    if not (run_dir / "events.jsonl").exists():
        return []
    return [event["resumed_from"] for event in read_events(run_dir, "start") if event["resumed_from"] is not None]


def kill_and_resume(
    data: DataConfig, place: str, settings: dict[str, Any], num_ranks: int, num_kills: int, num_steps: int = 1
) -> dict[str, Any]:
    """A run that no one kills, and one that is killed so often; returns what differs between their ends.

    num_steps: after how many steps of a start it is killed, but for each fourth, which is killed while it starts.
    """
    settings = {"train__steps": STEPS, **settings}
    moments = random.Random(len(settings) - 1 + num_ranks)
    straight = Attempt(data, Path(place, "straight"), settings, num_ranks)
    begun = time.monotonic()
    straight.start()
    assert straight.finish() == [0] * num_ranks
    # Most of a start goes into building the model and the engine; the rest, roughly, is steps and saves.
    seconds = time.monotonic() - begun
    run_dir = Path(place, "killed")
    metrics = run_dir / "metrics.jsonl"
    kills, resumed = 0, []
    while kills < num_kills:
        attempt = Attempt(data, run_dir, settings, num_ranks)
        lines = count_lines(metrics)
        attempt.start()
        if kills % 4 == 3:
            time.sleep(moments.uniform(0, seconds / 2))
        else:
            while count_lines(metrics) < lines + num_steps and not attempt.has_ended():
                time.sleep(0.001)
            time.sleep(moments.uniform(0, 2.5 * seconds / (STEPS + 10)))
        victim = moments.randrange(num_ranks)
        if attempt.has_ended() or count_lines(metrics) >= STEPS:
            # It came too far: begin a new run, so that each kill falls on a living one.
            attempt.finish()
            resumed += list_resumed(run_dir)
            shutil.rmtree(run_dir)
            continue
        os.kill(attempt.pids[victim], signal.SIGKILL)
        if kills % 4 == 3:
            # Ranks that meet no other wait as long as a start may take; a launcher ends them, so here it is done.
            for pid in attempt.pids:
                os.kill(pid, signal.SIGKILL)
        codes = attempt.finish()
        assert codes[victim] == -signal.SIGKILL and 0 not in codes, codes
        kills += 1
    last = Attempt(data, run_dir, settings, num_ranks)
    last.start()
    assert last.finish() == [0] * num_ranks
    name = f"checkpoints/step-{STEPS:08d}"
    difference = diff_checkpoints(straight.run_dir / name, run_dir / name)
    passed_over = [event for event in read_events(run_dir, "resume") if event["kind"] == "passed over"]
    return {**difference, "resumed": resumed + list_resumed(run_dir), "passed_over": passed_over}


def check_same_end(result: dict[str, Any]) -> None:
    assert result["tensors"] == {} and result["only_in_first"] == result["only_in_second"] == []
    assert result["state"] == {}
    assert list(result["settings"]) == ["run.dir"]
    assert result["passed_over"] == []
    assert result["resumed"], "no start continued from a checkpoint"


@pytest.mark.parametrize(
    ("num_kills", "num_steps", "precision"), [(1, 4, "float32"), pytest.param(3, 1, "bf16", marks=pytest.mark.slow)]
)
def test_a_run_that_is_killed_ends_in_the_same_weights(
    data: DataConfig, tmp_path: Path, num_kills: int, num_steps: int, precision: str
) -> None:
    settings = {"train__checkpoint_every_steps": 1, "train__precision": precision, "train__keep_last": 2}
    result = run_ranks(kill_and_resume, data, str(tmp_path), settings, 1, num_kills, num_steps, num_ranks=1)[0]
    check_same_end(result)


@pytest.mark.slow
@pytest.mark.parametrize(("num_ranks", "stage", "precision"), [(1, 1, "float32"), (2, 2, "bf16"), (2, 3, "float32")])
def test_a_run_killed_ten_times_ends_in_the_same_weights(
    data: DataConfig, tmp_path: Path, num_ranks: int, stage: int, precision: str
) -> None:
    settings = {
        "train__checkpoint_every_steps": 2,
        "train__precision": precision,
        "train__validate_every_steps": 5,
        "parallel__zero_stage": stage,
    }
    result = run_ranks(kill_and_resume, data, str(tmp_path), settings, num_ranks, 10, num_ranks=1)[0]
    check_same_end(result)
