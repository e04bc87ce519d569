"""Whole runs with rows cut over context ranks: validation, checkpoints, and steps that are skipped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.config import DataConfig
from pretrain.config import RunConfig
from pretrain.run import close_run, start_run
from pretrain.signals import SignalWatch
from pretrain.step import train_step
from tests.helpers.spawn import run_ranks
from tests.pretrain.tiny_run import Trained, tiny_config, tiny_data, train_and_collect


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    return tiny_data(tmp_path_factory.mktemp("data"))


def config_of(data: DataConfig, folder: Path, context: int, **settings: Any) -> RunConfig:
    settings = {
        "train__validate_every_steps": 2,
        "optimizer__epsilon": 1e-5,
        "optimizer__learning_rate": 1e-3,
    } | settings
    return tiny_config(data, folder, parallel__context=context, **settings)


def run_twice(data: DataConfig, folder: str, context: int) -> Trained:
    """Two steps, a checkpoint, and the rest in a second start."""
    train_and_collect(config_of(data, Path(folder), context, train__stop_after_steps=2))
    return train_and_collect(config_of(data, Path(folder), context))


def test_losses_and_validation_are_those_of_one_rank_over_a_restart(data: DataConfig, tmp_path: Path) -> None:
    (cut, _) = run_ranks(run_twice, data, str(tmp_path / "two"), 2, num_ranks=2)
    (whole,) = run_ranks(run_twice, data, str(tmp_path / "one"), 1, num_ranks=1)
    assert cut.code == whole.code == 0
    # float32 sums in another order.
    for key in ("loss", "grad_norm"):
        assert cut.series(key) == pytest.approx(whole.series(key), rel=1e-5)
    for own, other in zip(cut.metrics, whole.metrics, strict=True):
        assert own["expert_load"] == other["expert_load"]
        assert own["auxiliary"] == pytest.approx(other["auxiliary"], rel=1e-5)
        assert own.get("validation_loss", 0.0) == pytest.approx(other.get("validation_loss", 0.0), rel=1e-5)
    assert sum("validation_loss" in line for line in cut.metrics) == 2


def run_bf16(data: DataConfig, folder: str, context: int) -> Trained:
    return train_and_collect(config_of(data, Path(folder), context, train__precision="bf16"))


def test_bf16_losses_and_norms_are_those_of_one_rank(data: DataConfig, tmp_path: Path) -> None:
    (cut, _) = run_ranks(run_bf16, data, str(tmp_path / "two"), 2, num_ranks=2)
    (whole,) = run_ranks(run_bf16, data, str(tmp_path / "one"), 1, num_ranks=1)
    # Scans, carried states and sums of ranks are rounded to bf16 (2^-9) in other places.
    assert cut.series("loss") == pytest.approx(whole.series("loss"), rel=2e-3)
    assert cut.series("grad_norm") == pytest.approx(whole.series("grad_norm"), rel=2e-2)


def poison(data: DataConfig, folder: str) -> tuple[list[bool], Any]:
    with SignalWatch() as signals:
        run = start_run(config_of(data, Path(folder), 2), signals)
        victim = dict(run.model.named_parameters())["blocks.0.mixer.out_proj.weight"]
        before = victim.detach().clone()
        handle = victim.register_hook(lambda gradient: gradient * float("nan") if run.parallel.rank == 1 else gradient)
        poisoned = train_step(run)
        handle.remove()
        unmoved = torch.equal(victim, before)
        healthy = train_step(run)
        close_run(run)
    assert poisoned.skip is not None, "the step was not skipped"
    return [poisoned.applied, unmoved, healthy.applied], poisoned.skip


def test_a_bad_gradient_on_one_context_rank_is_known_to_both(data: DataConfig, tmp_path: Path) -> None:
    for flags, skip in run_ranks(poison, data, str(tmp_path), num_ranks=2):
        assert flags == [False, True, True], "the poisoned step moved nothing, the next one did"
        assert skip["sample_ids"] == list(range(4)), "context ranks share their samples"
        assert [fault["rank"] for fault in skip["faults"]] == [1]
