"""A store to compare with, and Ray for the tests that need it."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator

import pytest

from amfm.data_pipeline.config import DataConfig
from tests.helpers.tiny_store import make_tiny_store


@pytest.fixture(scope="module")
def alone_with_ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Held by one worker at a time: two Rays that start on two cores look for ports at once and wait for each other."""
    with open(tmp_path_factory.getbasetemp().parent / "ray.lock", "w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="module")
def ray_session(alone_with_ray: None) -> Iterator[None]:
    """A Ray of three actors in this process."""
    import ray

    # Without an address Ray would join a cluster that `ray start` left on this machine.
    ray.init(address="local", num_cpus=3, include_dashboard=False, log_to_driver=False, object_store_memory=80 * 2**20)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """A store of about ten parts, written in this process."""
    return make_tiny_store(tmp_path_factory.mktemp("reference"), num_sources=2, part_bytes=20_000)
