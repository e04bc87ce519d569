"""What tells mixers apart: tasks that one recurrence solves and another cannot, trained from the committed configurations."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CONFIGS = Path(__file__).parents[2] / "configs" / "probes"
TRANSNORMER = [
    "model.pattern={transnormer}",
    "model.mixers.transnormer={num_heads: 2, head_dim: 16, conv_kernel: 4}",
]


def run_amfm(*arguments: str, packages: Path) -> str:
    """What a verb prints, with what is installed in `packages`; one thread, so that a seed gives the same weights everywhere."""
    command = [sys.executable, "-W", "ignore", "-m", "amfm.launch", *arguments]
    installed = os.environ["PYTHONPATH"]  # examples/mixers
    paths = {"PYTHONPATH": os.pathsep.join([str(packages), str(CONFIGS.parents[1]), installed])}
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | paths
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def accuracy_of(name: str, folder: Path, overrides: list[str], length: int) -> float:
    """Share of right answers on rows of this length that no training sees."""
    config, run = str(CONFIGS / f"{name}.yaml"), str(folder / "run")
    run_amfm("train", config, f"run.dir={run}", "train.num_threads=1", *overrides, packages=folder)
    answer = run_amfm("evaluate", run, "--synthetic", name, "--length", str(length), "--json", packages=folder)
    return float(json.loads(answer)["accuracy"])


def install_ablation(folder: Path) -> None:
    """Registers `{time_invariant}` as a package of a user would."""
    metadata = folder / "time_invariant-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: time-invariant\nVersion: 1.0\n")
    entry = "[amfm.mixers]\ntime_invariant = tests.end_to_end.time_invariant:SPEC\n"
    (metadata / "entry_points.txt").write_text(entry)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "overrides", "length", "low", "high"),
    [
        ("parity", [], 256, 0.97, 1.0),
        ("parity", ["model.mixers.deltanet.allow_negative_eigenvalues=false"], 256, 0.45, 0.6),
        ("s3", [], 32, 0.98, 1.0),
        ("s3", ["model.mixers.deltaproduct.num_steps=1"], 32, 0.15, 0.6),
        ("overwriting", [], 64, 0.97, 1.0),
        ("overwriting", TRANSNORMER, 64, 0.0, 0.6),
        ("overwriting", ["model.pattern=K", "model.mixers.kda={num_heads: 2, head_dim: 16}"], 64, 0.95, 1.0),
        ("mqar", [], 48, 0.98, 1.0),
        ("mqar", ["model.pattern=MM"], 48, 0.0, 0.6),
        ("selective_copying", [], 96, 0.95, 1.0),
    ],
)
def test_a_mixer_solves_what_it_can_represent(name, overrides, length, low, high, tmp_path):
    assert low <= accuracy_of(name, tmp_path, overrides, length) <= high


@pytest.mark.slow
def test_a_time_invariant_ablation_does_not_copy_selectively(tmp_path):
    install_ablation(tmp_path)
    overrides = [
        "model.pattern={time_invariant}{time_invariant}",
        "model.mixers.time_invariant={num_heads: 8, head_dim: 16, conv_kernel: 4}",
    ]
    assert accuracy_of("selective_copying", tmp_path, overrides, 96) < 0.5
