"""kill -9 of a rank, of all ranks and of the launcher where a stage of another layout begins: the same final losses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import yaml

from amfm.launch.rank_command import rank_command
from amfm.pretrain.launcher_protocol import RUN_FAILED
from tests.helpers.patience import PATIENCE_SECONDS
from tests.parallel.test_stage_layouts import STEPS, staged_config
from tests.pretrain.tiny_run import read_events, read_metrics, tiny_data

LAYOUTS = [{"zero_stage": 1}, {"tensor": 2}]


def one_rank(launcher: subprocess.Popen[bytes]) -> list[int]:
    return [psutil.Process(launcher.pid).children()[1].pid]


def all_ranks(launcher: subprocess.Popen[bytes]) -> list[int]:
    return [child.pid for child in psutil.Process(launcher.pid).children()]


def the_launcher(launcher: subprocess.Popen[bytes]) -> list[int]:
    return [launcher.pid]


def start(config_file: Path) -> subprocess.Popen[bytes]:
    command = rank_command(["train", str(config_file), "--nproc", "2"])
    return subprocess.Popen(command)


def write_config(folder: Path) -> Path:
    """The run of two stages as a file."""
    config = staged_config(tiny_data(folder / "data"), folder / "run", LAYOUTS, 2)
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(json.loads(config.model_dump_json(exclude_unset=True))), encoding="utf-8")
    return path


@pytest.mark.slow
@pytest.mark.parametrize("victims", [one_rank, all_ranks, the_launcher])
def test_what_dies_at_the_boundary_costs_no_step(
    tmp_path: Path, victims: Callable[[subprocess.Popen[bytes]], list[int]]
) -> None:
    (tmp_path / "straight").mkdir()
    assert start(write_config(tmp_path / "straight")).wait(timeout=PATIENCE_SECONDS) == 0
    straight = read_metrics(tmp_path / "straight" / "run")
    assert [line["step"] for line in straight] == list(range(1, 2 * STEPS + 1))
    assert [event["stage"] for event in read_events(tmp_path / "straight" / "run", "next_layout")] == ["stage1"]
    (tmp_path / "killed").mkdir()
    path = write_config(tmp_path / "killed")
    saved = tmp_path / "killed" / "run" / "checkpoints" / f"step-{STEPS:08d}"
    launcher = start(path)
    while not (saved.exists() or saved.with_name(f"{saved.name}.tmp").exists()):
        assert launcher.poll() is None
        time.sleep(0.002)
    for pid in victims(launcher):
        os.kill(pid, signal.SIGKILL)
    code = launcher.wait(timeout=PATIENCE_SECONDS)
    if code != 0:  # the ranks were not yet through with the save
        assert code in (RUN_FAILED, -signal.SIGKILL)
        time.sleep(1)
        assert start(path).wait(timeout=PATIENCE_SECONDS) == 0
    killed = read_metrics(tmp_path / "killed" / "run")
    assert [line["loss"] for line in killed] == [line["loss"] for line in straight]
