"""Checkpoints of every N steps are exported while a run trains, one at a time, and what fails is said and holds nothing up."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from amfm.data_pipeline.config import DataConfig
from amfm.launch.follow_run import Exporter, following
from amfm.pretrain.checks.check_run import check_run
from amfm.pretrain.config.errors import ConfigError
from amfm.pretrain.monitor.follow import Seen, State
from amfm.pretrain.train import train
from tests.pretrain.tiny_run import tiny_config, tiny_data


def seen(state: State, *steps: int) -> Seen:
    return Seen([], [{"event": "checkpoint", "step": step} for step in steps], [], state, "")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    return tiny_data(tmp_path_factory.mktemp("data"))


@pytest.mark.slow
@pytest.mark.parametrize(("steps", "exported"), [(3, ["step-00000002"]), (4, ["step-00000002", "step-00000004"])])
def test_a_run_that_trains_leaves_the_exports_that_were_asked_for(
    steps: int, exported: list[str], data: DataConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    settings: dict[str, Any] = {"train__steps": steps, "train__checkpoint_every_steps": 1, "export__every_steps": 2}
    config = tiny_config(data, tmp_path / "run", **settings)
    with following(config):
        assert train(config) == 0
    exports = tmp_path / "run" / "exports"
    assert sorted(path.name for path in exports.iterdir()) == exported
    assert all((path / "config.json").is_file() for path in exports.iterdir())
    assert f"amfm: exported {exported[-1]} to" in capfd.readouterr().err


def test_one_that_is_done_is_said(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    exporter = Exporter(tmp_path, 5)
    exporter.running = "step-00000005", subprocess.Popen(["true"], stderr=subprocess.PIPE, text=True)
    exporter.leave(seen("finished"))
    assert f"amfm: exported step-00000005 to {tmp_path / 'exports' / 'step-00000005'}" in capfd.readouterr().err


def test_one_that_fails_is_said_and_one_that_is_pruned_or_there_is_left_out(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    exporter = Exporter(tmp_path, 5)
    (tmp_path / "checkpoints" / "step-00000005").mkdir(parents=True)  # without anything in it
    (tmp_path / "checkpoints" / "step-00000015").mkdir()
    (tmp_path / "exports" / "step-00000015").mkdir(parents=True)
    exporter.take(seen("running", 4, 5, 10, 15))
    assert exporter.running is not None and list(exporter.waiting) == ["step-00000010", "step-00000015"]
    exporter.leave(seen("finished"))
    assert exporter.running is None and not exporter.waiting
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("amfm: ")]
    assert line.startswith("amfm: warning: step-00000005 was not exported, training continues: ")


def test_a_launcher_that_must_go_ends_the_process(tmp_path: Path) -> None:
    exporter = Exporter(tmp_path, 5)
    (tmp_path / "checkpoints" / "step-00000005").mkdir(parents=True)
    exporter.take(seen("running", 5))
    assert exporter.running is not None
    process = exporter.running[1]
    exporter.leave(seen("running"))
    assert process.returncode is not None


def test_steps_without_a_checkpoint_are_refused(data: DataConfig, tmp_path: Path) -> None:
    for every in (None, 2):
        config = tiny_config(data, tmp_path, train__checkpoint_every_steps=every, export__every_steps=3)
        with pytest.raises(
            ConfigError, match=r"export.every_steps = 3: exports checkpoints, and .* has none of every 3"
        ):
            check_run(config)
