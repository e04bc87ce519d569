"""Peaks of memory beside the plan's, of real ranks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from amfm.launch.bench.memory import CASES, ROWS
from amfm.launch.cli import run
from amfm.pretrain.checks.check_run import load_checked

ROOT = Path(__file__).parents[3]
CONFIGS = ROOT / "configs"


def test_every_case_obeys_the_rules_of_a_run():
    assert len(set(CASES)) == len(CASES) >= 6
    for preset, ranks, overrides in CASES:
        settings = [*ROWS, f"train.global_batch_size={4 * ranks}", *overrides]
        load_checked(CONFIGS / f"{preset}.yaml", settings, world_size=ranks)


TWO_THREADS = {**os.environ, "OMP_NUM_THREADS": "2"}  # as users do


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "overrides"),
    [
        (1, ["parallel.zero_stage=3"]),
        (2, ["parallel.tensor=2", "parallel.sequence_parallel=true"]),
        (2, ["parallel.expert=2"]),
    ],
)
def test_predicted_memory_is_within_a_tenth_of_real_steps(ranks, overrides):
    # Around the tensors lie pages of the allocator and buffers of gloo; docs/benchmarks/planning.md has the whole table.
    settings = [*ROWS, f"train.global_batch_size={4 * ranks}", "train.precision=float32", *overrides]
    command = [sys.executable, "-m", "amfm.launch", "bench", "memory", str(CONFIGS / "ladder_20m.yaml"), *settings]
    done = subprocess.run(
        [*command, "--nproc", str(ranks), "--json"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
        env=TWO_THREADS,
    )
    found = json.loads(done.stdout)
    assert len(found["measured_bytes_by_rank"]) == ranks
    assert found["predicted_bytes"] == pytest.approx(found["measured_bytes"], rel=0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either CONFIG.yaml, for one layout, or --table configs"),
        ([str(CONFIGS / "ladder_20m.yaml"), "--table", "configs"], "give either CONFIG.yaml"),
        ([str(CONFIGS / "ladder_20m.yaml"), "parallel.tensor=3", "--nproc", "3"], "parallel.tensor"),
        (["nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_wrong_input_is_refused_before_ranks_are_started(arguments, message, capsys):
    assert run(["bench", "memory", *arguments]) == 2
    assert message in capsys.readouterr().err
