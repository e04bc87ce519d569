"""A study on real processes: what a kill leaves is finished by the next call, and a failed cell does not hold up the rest."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from amfm.pretrain.config.file import resolved_yaml
from amfm.pretrain.monitor.ownership import lock_directory
from tests.helpers.tiny_store import make_tiny_store
from tests.pretrain.tiny_run import read_events, read_metrics, tiny_config

pytestmark = pytest.mark.slow

STEPS = 300
CELLS = ("Mamba2-none-text-seed0", "Mamba2-1to1-text-seed0")


def write_study(folder: Path, **train: Any) -> list[str]:
    """Two cells, one after the other; returns the command."""
    settings = {f"train__{name}": value for name, value in train.items()}
    config = tiny_config(make_tiny_store(folder / "data"), folder / "unused", **settings)
    (folder / "text.yaml").write_text(resolved_yaml(config))
    (folder / "study.yaml").write_text(
        f"dir: {folder}/study\ntasks: [{{name: text, config: text.yaml}}]\nmixers: [{{mixer: M}}]\n"
        "ratios: [none, 1:1]\nnum_mixers: 2\nruns_at_once: 1\n"
    )
    return [sys.executable, "-m", "amfm.launch", "study", "mixers", str(folder / "study.yaml"), "--json"]


def call(command: list[str]) -> tuple[int, dict[str, Any], str]:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, json.loads(done.stdout), done.stderr


def cell_processes(folder: Path) -> list[psutil.Process]:
    wanted = str(folder / "study" / "configs")
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if any(word.startswith(wanted) for word in process.info["cmdline"] or [])
    ]


def wait_until(happens: Any) -> None:
    while not happens():
        time.sleep(0.05)


def test_after_a_kill_only_what_is_missing_runs_and_the_killed_cell_goes_on_from_its_checkpoint(tmp_path):
    command = write_study(tmp_path, steps=STEPS, checkpoint_every_steps=10)
    first, second = (tmp_path / "study" / "runs" / name for name in CELLS)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_until(lambda: list((second / "checkpoints").glob("step-*")) if (second / "checkpoints").exists() else False)
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_until(lambda: not cell_processes(tmp_path))  # no orphan continues writing
    stopped_at = read_metrics(second)[-1]["step"]
    assert stopped_at < STEPS and len(read_metrics(first)) == STEPS

    code, summary, _ = call(command)
    assert (code, summary["planned"], summary["finished"], summary["failed"]) == (0, 2, 2, {})
    assert [event["resumed_from"] for event in read_events(first, "start")] == [None]
    starts = [event["resumed_from"] for event in read_events(second, "start")]
    assert starts[0] is None and starts[1] is not None
    assert [item["step"] for item in read_metrics(second)] == list(range(1, STEPS + 1))
    for run in summary["runs"]:
        assert run["value"] == read_metrics(Path(run["run_dir"]))[-1]["validation_loss"]

    assert call(command)[1]["table"] == summary["table"]
    assert len(read_events(second, "start")) == 2, "a third call starts nothing"


def test_a_failed_cell_is_shown_with_its_cause_after_the_others_are_done(tmp_path):
    command = write_study(tmp_path)
    first, second = (tmp_path / "study" / "runs" / name for name in CELLS)
    with lock_directory(first):  # as if another process trained there
        code, summary, remarks = call(command)
    assert (code, summary["finished"], list(summary["failed"])) == (3, 1, [CELLS[0]])
    cause = f"another process trains in {first}; wait for it"
    assert cause in summary["failed"][CELLS[0]]
    assert f"amfm study: run {CELLS[0]} failed: amfm: {cause}" in " ".join(remarks.split())
    assert read_metrics(second)[-1]["step"] == 4

    code, summary, _ = call(command)
    assert (code, summary["finished"], summary["failed"]) == (0, 2, {})
    assert len(read_events(second, "start")) == 1


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_lets_the_running_cell_save_and_the_rest_wait(tmp_path, name):
    command = write_study(tmp_path, steps=STEPS)
    first, second = (tmp_path / "study" / "runs" / name for name in CELLS)
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    wait_until(lambda: (first / "metrics.jsonl").exists() and len(read_metrics(first)) > 5)
    if name == "SIGINT":
        os.killpg(process.pid, signal.SIGINT)  # as the keyboard does: to everything that the terminal started
    else:
        process.terminate()
    _, remarks = process.communicate()
    assert process.returncode == 0
    assert "stopped by a signal; the same command continues" in remarks
    assert len(read_events(first, "signal")) == 1 and not second.exists()
    assert list((first / "checkpoints").glob("step-*"))
