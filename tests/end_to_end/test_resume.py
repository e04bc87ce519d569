"""A run that stops and continues equals one that never stopped, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from amfm.data_pipeline.config import DataConfig
from tests.helpers.spawn import run_ranks
from tests.pretrain.tiny_run import Trained, tiny_config, tiny_data, train_and_collect

STEPS, STOP = 4, 2
Cases = list[tuple[str, int]]
# One rank alone has nothing to spread: two stages stand for the rest there.
ONE_RANK: Cases = [("float32", 0)]
ONE_RANK_MORE: Cases = [("float32", 1), ("bf16", 0), ("bf16", 1)]
TWO_RANKS: Cases = [("bf16", 1), ("bf16", 3)]
TWO_RANKS_MORE: Cases = [("bf16", 0), ("bf16", 2), *(("float32", stage) for stage in (0, 1, 2, 3))]


def train_all_cases(cases: Cases, data: DataConfig, folder: str, stop_after_steps: int | None) -> list[Trained]:
    """Every precision and stage in its own run directory, two micro-batches per rank and step where there are two ranks."""
    return [
        train_and_collect(
            tiny_config(
                data,
                Path(folder, f"{precision}-{stage}"),
                train__steps=STEPS,
                train__stop_after_steps=stop_after_steps,
                train__micro_batch_size=1,
                train__precision=precision,
                parallel__zero_stage=stage,
            )
        )
        for precision, stage in cases
    ]


@pytest.mark.parametrize(
    ("num_ranks", "cases"),
    [
        (1, ONE_RANK),
        (2, TWO_RANKS),
        pytest.param(1, ONE_RANK_MORE, marks=pytest.mark.slow),
        pytest.param(2, TWO_RANKS_MORE, marks=pytest.mark.slow),
    ],
    ids=["1", "2", "1-more", "2-more"],
)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path: Path, num_ranks: int, cases: Cases) -> None:
    data = tiny_data(tmp_path / "data")
    straight = run_ranks(train_all_cases, cases, data, str(tmp_path / "straight"), None, num_ranks=num_ranks)
    run_ranks(train_all_cases, cases, data, str(tmp_path / "resumed"), STOP, num_ranks=num_ranks)
    resumed = run_ranks(train_all_cases, cases, data, str(tmp_path / "resumed"), None, num_ranks=num_ranks)
    for case, expected, actual in zip(cases, straight[0], resumed[0]):
        for key in ("step", "loss", "grad_norm", "lr", "tokens", "auxiliary", "expert_load"):
            assert actual.series(key) == expected.series(key), f"{case}: {key}"
        assert actual.metrics[-1]["validation_loss"] == expected.metrics[-1]["validation_loss"], case
    for expected_rank, actual_rank in zip(straight, resumed):
        for case, expected, actual in zip(cases, expected_rank, actual_rank):
            for name, weight in expected.weights.items():
                assert torch.equal(actual.weights[name], weight), f"{case}: {name}"
