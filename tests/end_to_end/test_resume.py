"""A run that stops and continues equals one that never stopped, bitwise.

On one rank tests/pretrain/checkpoint/test_compatibility.py shows it quickly.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from amfm.data_pipeline.config import DataConfig
from tests.helpers.spawn import run_ranks
from tests.pretrain.tiny_run import MODEL, Trained, tiny_config, tiny_data, train_and_collect

STEPS, STOP = 3, 2
Cases = list[tuple[str, int]]
# Registered mixers keep nothing of their own between steps.
MIXERS: dict[str, Any] = MODEL | {
    "pattern": "{gdn2}E{mamba3}-C(W&M)",
    "mixers": {
        "gdn2": {"num_heads": 2, "head_dim": 8, "chunk_size": 16},
        "mamba3": {"num_heads": 4, "head_dim": 8, "state_size": 8, "num_groups": 2, "chunk_size": 16},
        "short_conv": {},
        "window": {"num_heads": 2, "num_kv_heads": 1, "head_dim": 8, "window": 12, "sinks": True},
    },
}
# Just one rank has nothing to spread: two stages stand for the rest there.
ONE_RANK: Cases = [("float32", 0)]
ONE_RANK_MORE: Cases = [("float32", 1), ("bf16", 0), ("bf16", 1)]
TWO_RANKS: Cases = [("float32", 1)]
TWO_RANKS_MORE: Cases = [*(("bf16", stage) for stage in (0, 1, 2, 3)), *(("float32", stage) for stage in (0, 2, 3))]


def train_all_cases(
    cases: Cases, data: DataConfig, folder: str, stop_after_steps: int | None, model: dict[str, Any] = MODEL
) -> list[Trained]:
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
                **{f"model__{key}": value for key, value in model.items()},
            )
        )
        for precision, stage in cases
    ]


def train_and_stop(cases: Cases, data: DataConfig, folder: str, model: dict[str, Any]) -> list[Trained]:
    """To the end, and apart from that to the middle, where other processes continue."""
    straight = train_all_cases(cases, data, f"{folder}/straight", None, model)
    train_all_cases(cases, data, f"{folder}/resumed", STOP, model)
    return straight


@pytest.mark.parametrize(
    ("num_ranks", "cases", "model"),
    [
        pytest.param(1, ONE_RANK, MODEL, marks=pytest.mark.slow),
        (2, TWO_RANKS, MODEL),
        pytest.param(1, ONE_RANK_MORE, MODEL, marks=pytest.mark.slow),
        pytest.param(2, TWO_RANKS_MORE, MODEL, marks=pytest.mark.slow),
        pytest.param(2, [("bf16", 1), ("bf16", 3)], MIXERS, marks=pytest.mark.slow),
    ],
    ids=["1", "2", "1-more", "2-more", "2-mixers"],
)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(
    tmp_path: Path, num_ranks: int, cases: Cases, model: dict[str, Any]
) -> None:
    data = tiny_data(tmp_path / "data")
    straight = run_ranks(train_and_stop, cases, data, str(tmp_path), model, num_ranks=num_ranks)
    resumed = run_ranks(train_all_cases, cases, data, str(tmp_path / "resumed"), None, model, num_ranks=num_ranks)
    for case, expected, actual in zip(cases, straight[0], resumed[0]):
        for key in ("step", "loss", "grad_norm", "lr", "tokens", "auxiliary", "expert_load"):
            assert actual.series(key) == expected.series(key), f"{case}: {key}"
        assert actual.metrics[-1]["validation_loss"] == expected.metrics[-1]["validation_loss"], case
    for expected_rank, actual_rank in zip(straight, resumed):
        for case, expected, actual in zip(cases, expected_rank, actual_rank):
            for name, weight in expected.weights.items():
                assert torch.equal(actual.weights[name], weight), f"{case}: {name}"
