"""Recipes of low precision under layouts of ranks: a pipeline rounds bitwise as one rank, cuts of matrices nearly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from amfm.data_pipeline.config import DataConfig
from tests.helpers.spawn import run_ranks
from tests.parallel.layouts import Layout, outcomes_of
from tests.pretrain.tiny_run import Trained, tiny_config, tiny_data, train_and_collect

NVFP4 = {"low_precision__recipe": "nvfp4", "low_precision__emulate": True, "low_precision__activation_storage": "fp8"}
# Without clipping no number of a step is summed over stages.
ROWS: dict[str, Any] = {
    "train__micro_batch_size": 1,
    "train__global_batch_size": 2,
    "train__steps": 2,
    "schedule__warmup_steps": 1,
    "optimizer__clip_grad_norm": None,
}


def train_schedules(data: DataConfig, folder: str, schedules: dict[str, dict[str, Any]]) -> dict[str, Trained]:
    return {
        name: train_and_collect(tiny_config(data, Path(folder, name), **ROWS, **NVFP4, **own))
        for name, own in schedules.items()
    }


@pytest.mark.parametrize("schedule", ["zero_bubble", pytest.param("1f1b", marks=pytest.mark.slow)])
def test_stages_of_a_pipeline_round_at_random_as_one_rank_does(tmp_path: Path, schedule: str) -> None:
    data = tiny_data(tmp_path / "data")
    (alone,) = run_ranks(train_schedules, data, str(tmp_path), {"one": {}}, num_ranks=1)
    schedules = {schedule: {"parallel__pipeline": 2, "parallel__schedule": schedule}}
    for rank in run_ranks(train_schedules, data, str(tmp_path), schedules, num_ranks=2):
        for name, found in rank.items():
            assert found.weights and found.weights.keys() < alone["one"].weights.keys()
            for weight, values in found.weights.items():
                assert torch.equal(values, alone["one"].weights[weight]), f"{weight} under {name}"


@pytest.mark.slow
@pytest.mark.parametrize(
    "parallels",
    [
        pytest.param([{"expert": 2}, {"expert": 2, "overlap_experts": True}], id="expert"),
        pytest.param([{"tensor": 2, "sequence_parallel": True}, {"tensor": 2}], id="tensor"),
    ],
)
def test_cuts_of_matrices_and_of_rows_move_blocks_and_little_else(parallels: list[dict[str, Any]]) -> None:
    settings = {
        "low_precision__recipe": "fp8_block",
        "low_precision__emulate": True,
        "low_precision__activation_storage": "fp8",
    }
    outcomes = outcomes_of([Layout(2, parallel, settings=settings) for parallel in parallels])
    (expected,) = outcomes_of([Layout(1, settings=settings)])
    for outcome, parallel in zip(outcomes, parallels, strict=True):
        # Experts are whole matrices and rows their own: forward nothing but the order of sums moves a code. A tensor rank's
        # block of 128 rows is another one.
        first = 1e-3 if "tensor" in parallel else 1e-4
        assert outcome.losses[0] == pytest.approx(expected.losses[0], rel=first)
        # Runs along the tokens are those of an expert's rows on its rank, of all data ranks together.
        assert outcome.losses == pytest.approx(expected.losses, rel=2e-2)
        assert outcome.grad_norms == pytest.approx(expected.grad_norms, rel=5e-2)
