"""A run for clusters, the losses that it must end with, and a folder with a short path for sockets."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from amfm.pretrain.config.file import resolved_yaml
from amfm.pretrain.config.schema import RunConfig
from tests.cluster.cluster import amfm, metrics
from tests.pretrain.tiny_run import tiny_config, tiny_data

STEPS = 60


@pytest.fixture
def folder() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="c.", dir="/tmp"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


def write_run(folder: Path, run_dir: Path, **overrides: Any) -> RunConfig:
    """A run of `STEPS` steps that any of one, two, three and six ranks can share, written to run.yaml next to it."""
    config = tiny_config(
        tiny_data(folder / "data"),
        run_dir,
        **{
            "train__steps": STEPS,
            "train__global_batch_size": 12,
            "train__sequence_length": 256,
            "train__checkpoint_every_steps": 10,
            "launch__heartbeat_seconds": 60.0,
            "launch__node_wait_seconds": 10.0,
            "launch__slurm": {"gpus": False, "signal_seconds": 60},
            **overrides,
        },
    )
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    (run_dir.parent / "run.yaml").write_text(resolved_yaml(config))
    return config


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses of the run on one rank that nothing disturbs."""
    root = tmp_path_factory.mktemp("undisturbed")
    write_run(root, root / "run")
    subprocess.run(amfm("train", root / "run.yaml"), check=True, capture_output=True)
    return [line["loss"] for line in metrics(root / "run")]


def check_losses(run_dir: Path, expected: list[float]) -> None:
    """Every step is there once, with the loss of an undisturbed run: sums over ranks differ in their order alone."""
    losses = [line["loss"] for line in metrics(run_dir)]
    assert len(losses) == len(expected)
    assert losses == pytest.approx(expected, abs=5e-4)
