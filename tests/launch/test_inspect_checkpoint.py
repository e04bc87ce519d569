"""`amfm inspect` on checkpoints: verifies, compares number by number, marks what must stay."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from amfm.launch.cli import run
from amfm.pretrain.engine.engine import ZeroEngine
from amfm.pretrain.parallel import initialize_parallel
from tests.helpers.patience import PATIENCE_SECONDS
from tests.pretrain.checkpoint.toys import make_engine, save


@pytest.fixture(scope="module")
def engine() -> ZeroEngine:
    return make_engine(initialize_parallel(timeout_seconds=PATIENCE_SECONDS, num_threads=1))


def inspect(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, dict[str, object], str]:
    code = run(["inspect", *map(str, arguments), "--json"])
    printed = capsys.readouterr()
    return code, json.loads(printed.out) if printed.out else {}, printed.err


def test_a_checkpoint_is_described_and_damage_is_named(
    engine: ZeroEngine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = save(tmp_path, 1, engine)
    code, found, _ = inspect(capsys, path)
    assert code == 0
    assert (found["kind"], found["ok"], found["step"], found["marked"]) == ("checkpoint", True, 1, False)
    assert found["layout"]["axes"] == {"tp": 1, "cp": 1, "ep": 1, "expt_tp": 1, "pp": 1, "dp": 1}
    shard = path / "rank-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    code, found, error = inspect(capsys, path)
    assert code == 2 and found["ok"] is False and "bytes, the manifest states" in error
    assert run(["inspect", str(path), "--protect"]) == 2
    assert "--protect marks a checkpoint that verifies" in capsys.readouterr().err


def test_two_checkpoints_are_compared_in_numbers_and_settings(
    engine: ZeroEngine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = save(tmp_path / "first", 1, engine)
    assert inspect(capsys, first, "--diff", first)[1]["same"] is True
    with torch.no_grad():
        engine.module.expert_bias[1] += 0.25
    second = save(tmp_path / "second", 1, engine, run__dir="moved")
    code, found, _ = inspect(capsys, second, "--diff", first)
    assert code == 0 and found["same"] is False
    assert found["tensors"] == {"expert_bias": {"buffer": 0.25}}
    assert found["settings"] == {"run.dir": ["unused", "moved"]}
    assert run(["inspect", str(second), "--diff", str(first)]) == 0
    table = capsys.readouterr().out
    assert "settings: run.dir" in table and "buffer 2.50e-01" in table


def test_marking_and_releasing(engine: ZeroEngine, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save(tmp_path, 1, engine)
    assert inspect(capsys, path, "--protect")[1]["marked"] is True
    assert (path / "keep").exists()
    assert inspect(capsys, path)[1]["marked"] is True
    assert inspect(capsys, path, "--unprotect")[1]["marked"] is False
    assert not (path / "keep").exists()
