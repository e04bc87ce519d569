"""The whole path learns: one batch by heart."""

from __future__ import annotations

from pathlib import Path

import pytest

from amfm.pretrain.monitor.signals import SignalWatch
from amfm.pretrain.start import close_run, start_run
from amfm.pretrain.step import train_step
from tests.pretrain.tiny_run import tiny_config, tiny_data


@pytest.mark.parametrize(("steps", "loss"), [(40, 4.0), pytest.param(200, 0.1, marks=pytest.mark.slow)])
def test_steps_on_one_batch_lower_its_loss_and_two_hundred_to_below_a_tenth(
    tmp_path: Path, steps: int, loss: float
) -> None:
    config = tiny_config(
        tiny_data(tmp_path / "data"),
        tmp_path / "run",
        model__hidden_size=64,
        train__steps=steps,
        train__global_batch_size=2,
        optimizer__learning_rate=1e-2,
        optimizer__weight_decay=0.0,
        schedule__warmup_steps=10,
    )
    losses = []
    with SignalWatch() as signals:
        run = start_run(config, signals)
        for _ in range(config.train.steps):
            run.loader.seek(0)
            losses.append(train_step(run).loss)
        close_run(run)
    assert losses[0] > 5.5
    assert losses[-1] < loss, f"{losses[::20]}"
