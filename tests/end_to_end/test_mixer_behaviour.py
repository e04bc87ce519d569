"""What tells mixers apart: tasks that one recurrence solves and another cannot, trained from the committed configurations."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CONFIGS = Path(__file__).parents[2] / "configs" / "probes"


def run_amfm(*arguments: str) -> str:
    """What a verb prints; one thread, so that a seed gives the same weights everywhere."""
    command = [sys.executable, "-W", "ignore", "-m", "launch", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def accuracy_of(name: str, run: Path, overrides: list[str], length: int) -> float:
    """Share of right answers on rows of this length that no training sees."""
    run_amfm("train", str(CONFIGS / f"{name}.yaml"), f"run.dir={run}", "train.num_threads=1", *overrides)
    answer = run_amfm("evaluate", str(run), "--probe", name, "--length", str(length), "--json")
    return float(json.loads(answer)["accuracy"])


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("name", "overrides", "length", "low", "high"),
    [
        ("parity", [], 256, 0.97, 1.0),
        ("parity", ["model.mixers.deltanet.allow_negative_eigenvalues=false"], 256, 0.45, 0.6),
        ("s3", [], 32, 0.98, 1.0),
        ("s3", ["model.mixers.deltaproduct.num_steps=1"], 32, 0.15, 0.6),
        ("overwriting", [], 64, 0.97, 1.0),
        ("overwriting", ["model.pattern={transnormer}"], 64, 0.0, 0.6),
    ],
)
def test_a_recurrence_solves_what_it_can_represent(name, overrides, length, low, high, tmp_path):
    assert low <= accuracy_of(name, tmp_path / "run", overrides, length) <= high
