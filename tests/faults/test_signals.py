"""Signals that come again while the first one is being obeyed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from amfm.data_pipeline.config import DataConfig
from amfm.pretrain.checkpoint.inspect import inspect_checkpoint
from amfm.pretrain.train import train
from tests.faults.disk import fault, with_faults
from tests.helpers.patience import PATIENCE_SECONDS
from tests.pretrain.tiny_run import read_events, read_metrics, tiny_config

STEPS = 40
SETTINGS = {"train__steps": STEPS}


@pytest.mark.slow
def test_more_sigterms_during_the_save_that_the_first_one_asked_for_change_nothing(
    data: DataConfig, tmp_path: Path
) -> None:
    """Each step waits a little, and the save 3 s in an fsync, so that the signals meet them."""
    rules = [
        fault("write", "*/metrics.jsonl", "sleep=0.2"),
        fault("fsync", "*/checkpoints/*.safetensors", "sleep=3", when=tmp_path / "slow"),
    ]
    (tmp_path / "slow").touch()
    run_dir = tmp_path / "run"
    jobs = {
        "data": data.model_dump(mode="json"),
        "runs": {"job": {"run": "run", "settings": SETTINGS, "ranks": 1}},
    }
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.faults.storage_child", str(tmp_path)], env=with_faults(rules)
    )
    wait_for(run_dir / "metrics.jsonl", lambda path: len(path.read_text().splitlines()) >= 3)
    (rank,) = psutil.Process(process.pid).children()
    rank.send_signal(signal.SIGTERM)
    wait_for(run_dir / "checkpoints", lambda path: any(found.suffix == ".tmp" for found in path.iterdir()))
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM):
        time.sleep(0.3)
        rank.send_signal(number)
    assert process.wait(timeout=PATIENCE_SECONDS) == 0
    assert json.loads((tmp_path / "results.json").read_text())["job"] == {"codes": [0], "said": [""]}
    (saved,) = (run_dir / "checkpoints").glob("step-*")
    assert inspect_checkpoint(saved)["ok"] and read_events(run_dir)[-1]["event"] == "signal"
    assert train(tiny_config(data, run_dir, **SETTINGS)) == 0
    assert train(tiny_config(data, tmp_path / "straight", **SETTINGS)) == 0
    losses = [[line["loss"] for line in read_metrics(place)] for place in (run_dir, tmp_path / "straight")]
    assert losses[0] == losses[1] and len(losses[0]) == STEPS


def wait_for(path: Path, holds: Callable[[Path], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not (path.exists() and holds(path)):
        assert time.monotonic() < deadline
        time.sleep(0.02)
