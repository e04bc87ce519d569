"""What several tests of this folder start from."""

from __future__ import annotations

from pathlib import Path

import pytest

from amfm.data_pipeline.config import DataConfig
from tests.pretrain.config.files import BASE
from tests.pretrain.tiny_run import tiny_data


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
