"""Runs the tests of `interpreter/` in Triton's interpreter: in one process, which imports Triton with TRITON_INTERPRET.

A process either interprets Triton kernels or compiles them, decided when Triton is imported. One file is run by
`TRITON_INTERPRET=1 python -m pytest tests/kernels/interpreter/test_moe.py`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from amfm.kernels.runtime.backend import INTERPRETED

FOLDER = Path(__file__).parent / "interpreter"
ROOT = Path(__file__).parents[2]

# An hour: half a minute of the processor becomes many minutes on a busy machine.
pytestmark = [pytest.mark.skipif(INTERPRETED, reason="this process interprets already"), pytest.mark.timeout(3600)]


def assert_hold(config: pytest.Config, *options: str) -> None:
    """Fail with pytest's output unless the tests of `FOLDER` that the options choose succeed."""
    seeds = ["--seed-offset", str(config.getoption("seed_offset"))]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options, *seeds, str(FOLDER)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_triton_kernels_hold_in_the_interpreter(pytestconfig: pytest.Config) -> None:
    assert_hold(pytestconfig, "-m", "not slow")


@pytest.mark.slow
def test_the_long_tests_of_kernels_hold_in_the_interpreter(pytestconfig: pytest.Config) -> None:
    """Quick siblings: the other cases of the same tests, in `test_triton_kernels_hold_in_the_interpreter`."""
    assert_hold(pytestconfig, "-m", "slow", "--twice")


@pytest.mark.slow
def test_every_case_has_the_same_bits_twice_in_the_interpreter(pytestconfig: pytest.Config) -> None:
    """Quick sibling: every fifth case is computed twice in `test_triton_kernels_hold_in_the_interpreter`."""
    assert_hold(pytestconfig, "-m", "not slow", "-k", "twice_bitwise", "--twice")
