"""Peaks of memory vs. the plan's, of real ranks."""

import json
import os

import pytest

from amfm.pretrain.checks.load import load_checked
from tests.launch.plan.real_memory import CASES, ROOT, ROWS, start_ranks

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
        (1, ["export.target=own", "model.attention_residuals.blocks_per_source=3"]),
        (2, ["export.target=own", "parallel.pipeline=2", "model.attention_residuals.blocks_per_source=2"]),
        (1, ["export.target=own", "model.hyper_connections.streams=4"]),
        (2, ["export.target=own", "parallel.pipeline=2", "model.hyper_connections.streams=4", "train.recompute=full"]),
    ],
)
def test_predicted_memory_is_within_a_tenth_of_real_steps(ranks, overrides):
    # Around the tensors are pages of the allocator and buffers of gloo; docs/benchmarks/planning.md has the whole table.
    settings = [*ROWS, f"train.global_batch_size={4 * ranks}", "train.precision=float32", *overrides]
    done = start_ranks(CONFIGS / "ladder_20m.yaml", ranks, settings, TWO_THREADS)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert len(found["measured_bytes_by_rank"]) == ranks
    assert found["predicted_bytes"] == pytest.approx(found["measured_bytes"], rel=0.1)
