"""These tests need TRITON_INTERPRET=1 before Triton is imported, so `test_interpreter.py` runs them in a child."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kernels.backend import INTERPRETED

collect_ignore_glob = [] if INTERPRETED else ["test_*.py"]


@pytest.fixture(autouse=True)
def no_races() -> Iterator[None]:
    """Hold every launch of every test here to accesses that something orders."""
    from kernels.proof.races import find_races

    with find_races() as races:
        yield
    assert races == []
