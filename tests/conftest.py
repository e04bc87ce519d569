"""Text that tests of behaviour in several rooms train on."""

from __future__ import annotations

from pathlib import Path

import pytest

from amfm.data_pipeline.prepare.sample_text import fetch_corpus


@pytest.fixture(scope="session")
def plays(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the plays; without a network the test is skipped."""
    folder = tmp_path_factory.mktemp("plays")
    try:
        fetch_corpus("shakespeare", folder)
    except RuntimeError as error:
        pytest.skip(str(error))
    return folder
