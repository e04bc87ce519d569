"""The misbehaving disk of tests/soak for tests: the environments of a process that meets faults, or is recorded."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.soak.disk import build_library as build
from tests.soak.disk import fault, fault_variables

__all__ = ["PATHS", "ROOT", "build_library", "fault", "with_faults", "with_record"]

ROOT = Path(__file__).resolve().parent.parent.parent
PATHS = os.pathsep.join((str(ROOT), os.environ["PYTHONPATH"]))  # and the packages of conftest.py


def build_library() -> Path:
    """The shared library; a machine without a compiler skips the test, and says what was not tested."""
    try:
        return build()
    except RuntimeError as error:
        pytest.skip(f"NOT TESTED: {error}")


def with_faults(rules: Sequence[str]) -> dict[str, str]:
    """The environment of a process that meets these faults."""
    build_library()
    return {**os.environ, **fault_variables(rules), "PYTHONPATH": PATHS}


def with_record(record: Path, under: Path) -> dict[str, str]:
    """The environment of a process whose changes below a folder are written down."""
    variables = {"LD_PRELOAD": str(build_library()), "AMFM_RECORD": str(record), "AMFM_RECORD_UNDER": str(under)}
    return {**os.environ, **variables, "PYTHONPATH": PATHS}
