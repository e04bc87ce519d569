"""A fork continues from a checkpoint as the run itself would, and with other settings where a resume allows them."""

from __future__ import annotations

from pathlib import Path

import pytest

from amfm.data_pipeline.config import DataConfig
from amfm.launch.cli import run as run_cli
from amfm.pretrain.config.file import load_config
from amfm.pretrain.report.data import read_run
from amfm.pretrain.train import train
from tests.helpers.json_output import one_object
from tests.pretrain.tiny_run import read_events, read_metrics, tiny_config


def losses(run_dir: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(run_dir)]


def test_a_fork_trains_on_as_the_run_did_and_another_branch_as_it_is_told(
    data: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert train(tiny_config(data, run, train__steps=5, train__checkpoint_every_steps=2, schedule__warmup_steps=1)) == 0
    files = {path: path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}
    assert run_cli(["fork", str(run), str(tmp_path / "same"), "--step", "2"]) == 0
    assert f"amfm train {tmp_path}/same/config.yaml" in capsys.readouterr().out.replace("\n", "")
    assert train(load_config(tmp_path / "same/config.yaml")) == 0
    assert losses(tmp_path / "same") == losses(run), "bitwise"
    stages = "stages=[{name: stable, steps: 2}, {name: anneal, steps: 2, learning_rate: 1e-3}]"
    branch = [str(tmp_path / "branch"), "train.steps=null", stages, "train.checkpoint_every_steps=null"]
    capsys.readouterr()
    assert run_cli(["fork", str(run), *branch, "--step", "2", "--json"]) == 0
    changes = one_object(capsys.readouterr().out)["changes"]
    assert any(change.startswith("train.steps: 5 -> None") for change in changes)
    assert train(load_config(tmp_path / "branch/config.yaml")) == 0
    assert losses(tmp_path / "branch")[:2] == losses(run)[:2] and len(losses(tmp_path / "branch")) == 4
    assert losses(tmp_path / "branch")[3] != losses(run)[3]
    (event,) = read_events(tmp_path / "branch", "forked")
    assert event["step"] == 2 and event["source"] == str(run) and event["changes"] == changes
    assert [event["step"] for event in read_run(tmp_path / "branch").events if event["event"] == "start"] == [0, 2]
    assert {path: path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()} == files


def test_what_cannot_be_forked_is_named_and_leaves_nothing(
    data: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert train(tiny_config(data, run, model__pattern="E-", train__steps=3, train__checkpoint_every_steps=2)) == 0
    for words, message in (
        (["--step", "1"], f"--step 1: {run} has checkpoints of steps 2, 3"),
        (["--step", "2", "optimizer.learning_rate=0.1"], "cannot resume step 2: optimizer.learning_rate"),
        (["--step", "2", "train.stop_after_steps=1"], "and the checkpoint has done 2"),
    ):
        assert run_cli(["fork", str(run), str(tmp_path / "out"), *words]) == 2
        assert message in " ".join(capsys.readouterr().err.split())
        assert not (tmp_path / "out").exists()
    assert run_cli(["fork", str(run), str(run), "--step", "2"]) == 2


def test_a_time_limit_saves_and_the_next_start_goes_on(data: DataConfig, tmp_path: Path) -> None:
    config = tiny_config(data, tmp_path / "run", model__pattern="E-", train__steps=4, train__stop_after_minutes=1e-6)
    assert train(config) == 0
    assert len(losses(tmp_path / "run")) == 2, "the step in which the time ran out, and the next"
    (event,) = read_events(tmp_path / "run", "time_limit")
    assert event["step"] == 1
    assert train(tiny_config(data, tmp_path / "run", model__pattern="E-", train__steps=4)) == 0
    assert train(tiny_config(data, tmp_path / "straight", model__pattern="E-", train__steps=4)) == 0
    assert losses(tmp_path / "run") == losses(tmp_path / "straight")


def test_steps_that_are_left_out_read_what_would_have_followed(data: DataConfig, tmp_path: Path) -> None:
    assert train(tiny_config(data, tmp_path / "plain", model__pattern="E-", train__steps=4)) == 0
    assert (
        train(tiny_config(data, tmp_path / "steps", model__pattern="E-", train__steps=4, data__skip_steps=[[2, 3]]))
        == 0
    )
    assert (
        train(tiny_config(data, tmp_path / "samples", model__pattern="E-", train__steps=4, data__skip=[[4, 12]])) == 0
    )
    plain, steps, samples = (losses(tmp_path / name) for name in ("plain", "steps", "samples"))
    assert steps == samples and steps[0] == plain[0] and steps[1] != plain[1]
