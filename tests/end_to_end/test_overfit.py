"""The whole path learns: one batch by heart."""

from __future__ import annotations

from pathlib import Path

from amfm.pretrain.monitor.signals import SignalWatch
from amfm.pretrain.start import close_run, start_run
from amfm.pretrain.step import train_step
from tests.pretrain.tiny_run import tiny_config, tiny_data


def test_two_hundred_steps_on_one_batch_reach_a_loss_below_a_tenth(tmp_path: Path) -> None:
    config = tiny_config(
        tiny_data(tmp_path / "data"),
        tmp_path / "run",
        model__hidden_size=64,
        train__steps=200,
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
    assert losses[-1] < 0.1, f"{losses[::20]}"
