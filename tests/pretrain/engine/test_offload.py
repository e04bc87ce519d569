"""Master weights and moments in the host's memory: the same training, skips and resumes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from amfm.data_pipeline.config import DataConfig
from amfm.pretrain.monitor.signals import SignalWatch
from amfm.pretrain.start import close_run, start_run
from tests.helpers.spawn import run_ranks
from tests.pretrain.test_ranks import poison_gradient
from tests.pretrain.tiny_run import Trained, collect_weights, tiny_config, train_and_collect


def train_with_and_without(data: DataConfig, folder: str, stage: int, precision: str) -> list[Trained]:
    """On the device, offloaded, and offloaded with a stop and a resume in between."""
    trained = []
    for name, offload, stops in (("device", False, [None]), ("host", True, [None]), ("twice", True, [2, None])):
        for stop in stops:
            config = tiny_config(
                data,
                Path(folder, name),
                parallel__zero_stage=stage,
                parallel__offload_optimizer=offload,
                train__precision=precision,
                train__stop_after_steps=stop,
            )
            last = train_and_collect(config)
        trained.append(last)
    return trained


@pytest.mark.parametrize(("stage", "precision"), [(1, "float32"), pytest.param(3, "bf16", marks=pytest.mark.slow)])
def test_offloaded_training_is_the_same_and_resumes_to_the_bit(
    data: DataConfig, tmp_path: Path, stage: int, precision: str
) -> None:
    ((on_device, on_host, resumed),) = run_ranks(
        train_with_and_without, data, str(tmp_path), stage, precision, num_ranks=1
    )
    assert on_host.series("loss") == on_device.series("loss")
    assert resumed.series("loss") == on_host.series("loss")
    for name, weight in on_host.weights.items():
        assert torch.equal(weight, on_device.weights[name]), name
        assert torch.equal(weight, resumed.weights[name]), name


def skip_offloaded(data: DataConfig, folder: str, stage: int) -> tuple[bool, bool]:
    config = tiny_config(data, Path(folder), parallel__zero_stage=stage, parallel__offload_optimizer=True)
    with SignalWatch() as signals:
        run = start_run(config, signals)
        before = collect_weights(run)
        result = poison_gradient(run)
        after: dict[str, Any] = collect_weights(run)
        close_run(run)
    return result.applied, all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("stage", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_bad_gradient_moves_nothing_on_the_host(data: DataConfig, tmp_path: Path, stage: int) -> None:
    assert run_ranks(skip_offloaded, data, str(tmp_path), stage, num_ranks=2) == [(False, True)] * 2
