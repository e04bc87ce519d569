"""A step far above the recent ones is reported with its samples, once, and changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from amfm.data_pipeline.config import DataConfig
from amfm.pretrain.checks.check_run import check_run
from amfm.pretrain.config.errors import ConfigError
from amfm.pretrain.monitor.signals import SignalWatch
from amfm.pretrain.start import close_run, start_run
from amfm.pretrain.step import train_step
from amfm.pretrain.train import run_steps
from tests.helpers.spawn import run_ranks
from tests.helpers.spoiled_gradient import spoil_gradient
from tests.pretrain.monitor.test_anomalies import train_with_a_blow
from tests.pretrain.tiny_run import collect_weights, read_events, tiny_config


def test_a_blow_is_reported_with_its_step_and_samples_and_left_out_of_the_window(
    data: DataConfig, tmp_path: Path
) -> None:
    reported = train_with_a_blow(data, str(tmp_path / "on"), {"health__spike_sigma": 5.0})
    (first, *others) = read_events(tmp_path / "on", "spike")
    assert first["step"] in (10, 11) and max(first["sigma"].values()) > 5
    assert first["samples"] == [4 * (first["step"] - 1), 4 * first["step"]]
    assert {event["step"] for event in others} <= {11, 12, 13, 14}
    assert "spike" in reported.metrics[first["step"] - 1] and "spike" not in reported.metrics[7]
    silent = train_with_a_blow(data, str(tmp_path / "off"), {"health__spike_sigma": None})
    assert not read_events(tmp_path / "off", "spike")
    assert silent.series("loss") == reported.series("loss")


SIGMA: dict[str, Any] = {"health__spike_rule": "sigma", "health__spike_sigma": 5.0}
NORM_STEP = 9


def train_with_a_large_gradient(data: DataConfig, folder: str, settings: dict[str, Any]) -> tuple[bool, int]:
    """Whether step 9, whose loss is as before and gradient a hundred times as large, moved no weight; and the exit code."""
    changes = {"train__steps": 10, "health__spike_window": 8, "health__on_spike": "skip", "model__pattern": "E-"}
    changes |= SIGMA | settings
    with SignalWatch() as signals:
        run = start_run(tiny_config(data, Path(folder), **changes), signals)
        for _ in range(NORM_STEP - 1):
            result = train_step(run)
            for hook in run.hooks:
                hook.after_step(result)
        before = {name: weight for name, weight in collect_weights(run).items() if "expert_bias" not in name}
        stop = spoil_gradient(run.model.get_parameter("blocks.1.mixer.up_proj.weight"), lambda gradient: 100 * gradient)
        result = train_step(run)
        stop()
        for hook in run.hooks:
            hook.after_step(result)
        assert result.anomaly is not None and not result.applied and result.anomaly.kind == "spike"
        assert result.anomaly.text.startswith("gradient norm ")
        assert "standard deviations above the mean of 8 steps" in result.anomaly.text
        after = collect_weights(run)
        code = run_steps(run)
        close_run(run)
    return all(torch.equal(after[name], weight) for name, weight in before.items()), code


def train_layouts(layouts: list[dict[str, Any]], data: DataConfig, folder: str) -> list[tuple[bool, int]]:
    return [
        train_with_a_large_gradient(data, f"{folder}/{number}", settings) for number, settings in enumerate(layouts)
    ]


@pytest.mark.parametrize("stages", [(2,), pytest.param((0, 3), marks=pytest.mark.slow)])
def test_a_gradient_norm_of_many_deviations_moves_nothing_on_any_rank(
    data: DataConfig, tmp_path: Path, stages: tuple[int, ...]
) -> None:
    layouts = [{"parallel__zero_stage": stage} for stage in stages]
    for found in run_ranks(train_layouts, layouts, data, str(tmp_path), num_ranks=2):
        assert found == [(True, 0)] * len(stages)
    (event,) = read_events(tmp_path / "0", "skipped_step")
    assert event["step"] == NORM_STEP and event["cause"].startswith("gradient norm ")


def test_a_loss_of_many_deviations_goes_back_by_the_same_policies(data: DataConfig, tmp_path: Path) -> None:
    settings = SIGMA | {"health__on_spike": "rollback", "train__checkpoint_every_steps": 3}
    train_with_a_blow(data, str(tmp_path), settings)
    event = read_events(tmp_path, "rolled_back")[0]
    assert event["weights_of_step"] == 9 and "standard deviations above the mean of 8 steps" in event["cause"]


def test_a_rule_without_what_it_acts_by_is_refused(data: DataConfig, tmp_path: Path) -> None:
    for settings in ({"health__on_spike": "ignore"}, {"health__on_spike": "skip", "health__spike_sigma": None}):
        with pytest.raises(ConfigError, match=r"health.spike_rule = sigma: acts by on_spike=.* one of the two is off"):
            check_run(tiny_config(data, tmp_path, **SIGMA | settings))
