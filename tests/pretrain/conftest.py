"""What several tests of this folder start from."""

from __future__ import annotations

from pathlib import Path

import pytest

from amfm.data_pipeline.config import DataConfig
from amfm.pretrain.monitor import environment, peaks
from tests.pretrain.config.files import BASE
from tests.pretrain.distillation.teachers import train_teacher
from tests.pretrain.tiny_run import tiny_data

# One small product of matrices in place of 0.1 s a run: no test claims what a CPU can do.
peaks.MEASURED_SECONDS = 0.0
environment.MEASURED_SIZE["cpu"] = 256


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """One small store for the whole session; nothing writes to it."""
    return tiny_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """The file of a sound run."""
    path = tmp_path / "base.yaml"
    path.write_text(BASE, encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def teacher(data: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The run of a small teacher; nothing writes to it."""
    return train_teacher(data, tmp_path_factory.mktemp("teacher") / "run")
