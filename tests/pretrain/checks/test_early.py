"""What is rejected before PyTorch is imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from amfm.data_pipeline.config import DataConfig
from amfm.launch.cli import run
from amfm.launch.commands.train import describe_prepare
from amfm.pretrain.checks.early import check_early
from amfm.pretrain.monitor.ownership import lock_directory
from tests.pretrain.tiny_run import tiny_config

ROOT = Path(__file__).parents[3]


def test_a_start_without_a_store_names_the_command_that_makes_it(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["train", str(base), "data.store=/nowhere", "train.steps=3"]) == 2
    said = capsys.readouterr().err
    assert f"run `amfm prepare {base} data.store=/nowhere` first" in said and "resume" not in said
    assert describe_prepare(Path("a file.yaml"), [], None) == "amfm prepare 'a file.yaml'"
    assert (
        describe_prepare(Path("x.yaml"), ["data.store=a"], "tiny_cpu") == "amfm prepare --preset tiny_cpu data.store=a"
    )


def test_a_second_start_in_a_directory_is_bad_input(
    base: Path, data: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(data, tmp_path / "run")
    check_early(config, "amfm prepare x.yaml")
    with lock_directory(Path(config.run.dir)):
        assert run(["train", str(base), f"run.dir={config.run.dir}", f"data.store={data.store}"]) == 2
        said = capsys.readouterr().err
        assert "another process trains in" in said and "resume with the same command" not in said
    check_early(config, "amfm prepare x.yaml")  # the lock ended, and a look at it left nothing behind


def test_neither_needs_torch() -> None:
    code = "import sys; import amfm.pretrain.checks.early, amfm.pretrain.config.file; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
