"""Steps of a finished run are computed again bitwise, and what does not agree is named: number, rank and tensor."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from amfm.data_pipeline.config import DataConfig
from amfm.launch.cli import run as run_cli
from amfm.pretrain.checkpoint.files import write_tensors
from amfm.pretrain.checkpoint.manifest_file import checkpoint_name, encode_manifest, read_manifest
from amfm.pretrain.train import train
from tests.helpers.json_output import one_object
from tests.helpers.spawn import run_ranks
from tests.pretrain.tiny_run import tiny_config

HEAD = ("format", "format_version", "sha256")
Replayed = Callable[..., tuple[int, dict[str, Any]]]


def finished(data: DataConfig, run_dir: Path, **settings: Any) -> Path:
    """A run of five steps with checkpoints after 2, 3, 4 and 5, which stopped after 3 and was resumed."""
    settings = {"train__steps": 5, "train__checkpoint_every_steps": 2, "train__keep_last": 9} | settings
    config = tiny_config(data, run_dir, **settings)
    stopped = config.model_copy(update={"train": config.train.model_copy(update={"stop_after_steps": 3})})
    assert train(stopped) == 0 and train(config) == 0
    return run_dir


@pytest.fixture
def replay(capsys: pytest.CaptureFixture[str]) -> Replayed:
    def replay(run_dir: Path, step: int, *words: str) -> tuple[int, dict[str, Any]]:
        capsys.readouterr()
        code = run_cli(["replay", str(run_dir), "--step", str(step), "--json", *words])
        return code, one_object(capsys.readouterr().out)

    return replay


def rewrite(run_dir: Path, step: int, change: Callable[[dict[str, torch.Tensor]], None], rank: int = 0) -> None:
    """Change tensors of a checkpoint with sound digests, as memory that fails before a save does."""
    place = run_dir / "checkpoints" / checkpoint_name(step)
    file = f"rank-{rank:05d}.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(place / file).items()}
    change(tensors)
    (place / file).unlink()
    entry = write_tensors(place / file, tensors, {"format": "pt"})
    manifest = read_manifest(place)
    manifest["files"][file] = {"bytes": entry.num_bytes, "sha256": entry.sha256}
    (place / "manifest.json").write_text(encode_manifest({k: v for k, v in manifest.items() if k not in HEAD}))


def flip(tensors: dict[str, torch.Tensor], bit: int) -> None:
    name = next(name for name in tensors if name.startswith("weight/") and "down_proj" in name)
    tensors[name].view(torch.int32)[3] ^= 1 << bit


def test_steps_of_a_sound_run_are_given_again_to_the_bit_and_the_run_stays(
    data: DataConfig, tmp_path: Path, replay: Replayed
) -> None:
    run = finished(data, tmp_path / "run", train__validate_every_steps=2)
    files = {path: path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}
    code, found = replay(run, 5)
    assert code == 0, found
    assert (found["equal"], found["has_checkpoint"], found["tensors"], found["remarks"]) == (True, True, 0, [])
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert found["loss"] == lines[4]["loss"] and found["grad_norm"] == lines[4]["grad_norm"]
    assert {path: path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()} == files
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    # Over the resume, where only older checkpoints are left.
    for step in (3, 4):
        (run / "checkpoints" / checkpoint_name(step)).rename(tmp_path / str(step))
    code, without = replay(run, 4)
    assert code == 0 and without["equal"] and not without["has_checkpoint"] and without["first"] == 3
    assert without["loss"] == lines[3]["loss"] and without["weights_sha256"] != found["weights_sha256"]


def test_a_flipped_bit_and_a_changed_number_are_named(data: DataConfig, tmp_path: Path, replay: Replayed) -> None:
    run = finished(data, tmp_path / "run", model__pattern="E-")
    rewrite(run, 4, partial(flip, bit=0))
    code, found = replay(run, 4)
    first = found["difference"]
    assert code == 3 and not found["equal"] and found["tensors"] == 1
    assert first["name"] == "weight of blocks.0.mixer.shared.down_proj.weight"
    assert (first["step"], first["rank"], first["index"]) == (4, 0, 3)
    # What is computed from a wrong checkpoint differs from the run's lines.
    rewrite(run, 4, partial(flip, bit=22))
    code, found = replay(run, 5)
    assert code == 3 and found["difference"]["step"] == 5 and found["difference"]["name"] == "loss"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines[2]["grad_norm"] *= 1 + 2**-52
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, found = replay(run, 3)
    first = found["difference"]
    assert code == 3 and (first["step"], first["name"], first["recorded"]) == (3, "grad_norm", lines[2]["grad_norm"])


def test_what_cannot_be_computed_again_is_one_message(
    data: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = finished(data, tmp_path / "run", model__pattern="E-")
    assert run_cli(["replay", str(run), "--step", "9"]) == 2
    assert f"--step 9: {run} has steps 1 to 5" in " ".join(capsys.readouterr().err.split())
    assert run_cli(["replay", str(tmp_path), "--step", "2"]) == 2
    events = (run / "events.jsonl").read_text()
    (run / "events.jsonl").write_text(events.replace('"code": "', '"code": "x'))
    assert run_cli(["replay", str(run), "--step", "3"]) == 0
    assert "amfm's source files was x" in " ".join(capsys.readouterr().out.split())
    # A record of how a step was trained that is gone.
    recorded = {json.loads(line).get("config") for line in events.splitlines()} - {None}
    for name in recorded:
        (run / name).rename(tmp_path / Path(name).name)
    assert run_cli(["replay", str(run), "--step", "4"]) == 2
    assert "the configuration of start 2, is missing" in " ".join(capsys.readouterr().err.split())
    (run / "events.jsonl").write_text("")
    assert run_cli(["replay", str(run), "--step", "4"]) == 2
    assert "do not show which starts trained steps 4 to 4" in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
def test_steps_before_the_first_checkpoint_are_computed_from_the_beginning_start_after_start(
    data: DataConfig, tmp_path: Path, replay: Replayed
) -> None:
    """Three starts with unlike settings, of which no checkpoint but the last is left."""
    for last, recompute in ((1, "none"), (3, "full"), (None, "none")):
        settings = {"train__steps": 5, "train__stop_after_steps": last, "train__recompute": recompute}
        assert train(tiny_config(data, tmp_path / "run", **settings)) == 0
    run = tmp_path / "run"
    for step in (1, 3):
        (run / "checkpoints" / checkpoint_name(step)).rename(tmp_path / str(step))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for step, legs in ((1, [1]), (5, [1, 3, 5])):
        code, found = replay(run, step)
        assert code == 0 and found["equal"] and found["first"] == 1, found
        assert [leg["last"] for leg in found["legs"]] == legs
        assert (found["loss"], found["grad_norm"]) == (lines[step - 1]["loss"], lines[step - 1]["grad_norm"])
        assert found["has_checkpoint"] == (step == 5)


def train_on_two(data: DataConfig, run_dir: str) -> None:
    finished(data, Path(run_dir), parallel__zero_stage=2)


@pytest.mark.slow
def test_a_run_of_two_ranks_names_the_rank_that_wrote_the_number(
    data: DataConfig, tmp_path: Path, replay: Replayed
) -> None:
    run_ranks(train_on_two, data, str(tmp_path / "run"))
    run = tmp_path / "run"
    rewrite(run, 4, partial(flip, bit=0), rank=1)
    code, found = replay(run, 4)
    assert code == 3 and found["legs"] == [{"last": 4, "world_size": 2}] and found["tensors"] == 1
    assert found["difference"]["rank"] == 1
