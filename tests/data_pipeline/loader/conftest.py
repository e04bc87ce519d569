"""The store that loaders read here; nothing writes to it."""

import pytest

from tests.helpers.tiny_store import make_tiny_store


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return make_tiny_store(tmp_path_factory.mktemp("data"), num_sources=2)
