"""What tests of packages start from."""

from __future__ import annotations

import pytest

from amfm.data_pipeline.config import DataConfig
from amfm.pretrain.monitor import peaks
from tests.pretrain.tiny_run import tiny_data

peaks.MEASURED_SECONDS = 0.0  # as in tests/pretrain/conftest.py: no test claims what a CPU can do


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """One small store for the whole session; nothing writes to it."""
    return tiny_data(tmp_path_factory.mktemp("data"))
