"""Runs the tests of `interpreter/` in Triton's interpreter: one child process for each file.

A process either interprets Triton kernels or compiles them, decided when Triton is imported.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernels.backend import INTERPRETED

FOLDER = Path(__file__).parent / "interpreter"
ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(INTERPRETED, reason="this process interprets already")
@pytest.mark.parametrize("file", sorted(path.name for path in FOLDER.glob("test_*.py")))
def test_triton_kernels_hold_in_the_interpreter(file: str) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-x", str(FOLDER / file)]
    child = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stdout + child.stderr
