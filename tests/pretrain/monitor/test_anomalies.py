"""What follows from a loss that jumps and gradients that are not finite, and who is called slow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from amfm.data_pipeline.config import DataConfig
from amfm.pretrain.checks.check_run import check_run
from amfm.pretrain.config.schema import HealthConfig
from amfm.pretrain.monitor.anomalies import judge_loss, remember
from amfm.pretrain.monitor.signals import SignalWatch
from amfm.pretrain.monitor.stragglers import compare_ranks
from amfm.pretrain.saving import restore_newest_weights, save
from amfm.pretrain.start import close_run, start_run
from amfm.pretrain.step import train_step
from amfm.pretrain.train import run_steps
from tests.helpers.spawn import run_ranks
from tests.pretrain.tiny_run import Trained, collect_weights, read_events, read_metrics, tiny_config

BLOW_STEP = 9
SETTINGS: dict[str, Any] = {
    "train__steps": 14,
    "train__checkpoint_every_steps": 20,
    "health__spike_window": 8,
    "health__spike_ratio": 1.15,
}


def test_a_spike_is_judged_against_the_median_of_a_full_window() -> None:
    health = HealthConfig(on_spike="stop", spike_ratio=2.0, spike_window=8)
    window: list[float] = []
    for loss in (3.0, 3.0, 9.0, 1.0, 3.0, 3.0, 3.0):
        assert judge_loss(100.0, window, health) is None
        remember(loss, window, health)
    remember(3.0, window, health)
    assert judge_loss(6.0, window, health) is None
    anomaly = judge_loss(6.1, window, health)
    assert anomaly is not None and anomaly.text == "loss 6.1000 is above 2 x 3.0000, the median of 8 steps"
    remember(5.0, window, health)
    assert window == [3.0, 9.0, 1.0, 3.0, 3.0, 3.0, 3.0, 5.0]
    assert judge_loss(float("nan"), window, health) is None  # gradients that are not finite are another anomaly


def train_with_a_blow(data: DataConfig, folder: str, settings: dict[str, Any]) -> Trained:
    """Nine steps, a checkpoint, then all master weights six times as large: the loss jumps when a step has used them."""
    config = tiny_config(data, Path(folder), **{**SETTINGS, **settings})
    with SignalWatch() as signals:
        run = start_run(config, signals)
        run.config = config.model_copy(
            update={"train": config.train.model_copy(update={"stop_after_steps": BLOW_STEP})}
        )
        assert run_steps(run) == 0
        masters = [master for group in run.engine.adamw.param_groups for master in group["params"]]
        if run.engine.zero_stage == 3:  # AdamW gets them for the time of a step only
            masters = run.engine.optimizer.fp32_partitioned_groups_flat
        for master in masters:
            master.data.mul_(6.0)
        run.config = config
        code = run_steps(run)
        weights = collect_weights(run)
        close_run(run)
    return Trained(code, read_metrics(run.directory) if run.parallel.is_main else [], weights)


def spike_step(metrics: list[dict[str, Any]]) -> int:
    losses = [line["loss"] for line in metrics]
    return next(number for number in range(BLOW_STEP + 1, len(losses) + 1) if losses[number - 1] > 1.1 * losses[0])


def test_a_spike_that_stops_leaves_the_checkpoint_before_it(data: DataConfig, tmp_path: Path) -> None:
    trained = train_with_a_blow(data, str(tmp_path), {"health__on_spike": "stop"})
    assert trained.code == 3
    assert len(trained.metrics) == spike_step(trained.metrics)
    cause = read_events(tmp_path, "gave_up")[0]["cause"]
    assert "the median of 8 steps (health.on_spike=stop)" in cause
    assert [path.name for path in (tmp_path / "checkpoints").glob("step-*")] == ["step-00000009"]


def train_with_blows(data: DataConfig, folder: str, cases: list[tuple[int, int]]) -> list[Trained]:
    """A run for each ZeRO stage and number of skipped steps after which it gives up."""
    return [
        train_with_a_blow(
            data,
            str(Path(folder, f"{stage}-{limit}")),
            {"health__on_spike": "skip", "train__max_skipped_steps": limit, "parallel__zero_stage": stage},
        )
        for stage, limit in cases
    ]


@pytest.mark.parametrize("stages", [(1,), pytest.param((0, 3), marks=pytest.mark.slow)])
def test_skipped_spikes_move_no_weight_on_any_rank(data: DataConfig, tmp_path: Path, stages: tuple[int, ...]) -> None:
    cases = [(stage, limit) for stage in stages for limit in (1, 3)]
    ranks = run_ranks(train_with_blows, data, str(tmp_path), cases)
    assert [trained.code for rank in ranks for trained in rank] == [3] * 2 * len(cases)
    for long in ranks[0][1::2]:
        first = spike_step(long.metrics)
        assert [line["step"] for line in long.metrics if line["skipped"]] == [first, first + 1, first + 2]
    for rank in ranks:
        for (stage, _), after_one, after_three in zip(cases[::2], rank[::2], rank[1::2]):
            for name, weight in after_one.weights.items():
                assert torch.equal(after_three.weights[name], weight), (stage, name)


@pytest.mark.parametrize("zero_stage", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_a_rollback_takes_the_weights_of_a_checkpoint_and_goes_on_with_new_data(
    data: DataConfig, tmp_path: Path, zero_stage: int
) -> None:
    settings = {"health__on_spike": "rollback", "parallel__zero_stage": zero_stage}
    trained = train_with_a_blow(data, str(tmp_path), settings)
    assert trained.code == 0
    spike = spike_step(trained.metrics)
    rolled = read_events(tmp_path, "rolled_back")
    assert [(event["step"], event["weights_of_step"]) for event in rolled] == [(spike, BLOW_STEP)]
    assert trained.series("step") == list(range(1, 15))
    assert trained.series("tokens") == [4 * 48 * number for number in range(1, 15)]
    assert max(trained.series("loss")[spike:]) < trained.series("loss")[0]
    # What was rolled back is its own checkpoint: a run that stops here continues from it.
    assert (tmp_path / f"checkpoints/step-{spike:08d}").is_dir()


def test_a_step_that_was_skipped_and_rolled_back_counts_once(data: DataConfig, tmp_path: Path) -> None:
    with SignalWatch() as signals:
        run = start_run(tiny_config(data, tmp_path), signals)
        train_step(run)
        save(run)
        for _ in range(2):
            run.engine.skip_next_step()
            assert not train_step(run).applied
        assert restore_newest_weights(run) == 1
        assert run.progress.step == 3 and run.progress.skipped_steps == 2
        close_run(run)


def test_rollbacks_are_counted(data: DataConfig, tmp_path: Path) -> None:
    settings = {"health__on_spike": "rollback", "health__max_rollbacks": 0}
    assert train_with_a_blow(data, str(tmp_path), settings).code == 3
    assert "after 0 rollbacks (health.max_rollbacks)" in read_events(tmp_path, "gave_up")[0]["cause"]


def test_rolling_back_needs_checkpoints(data: DataConfig, tmp_path: Path) -> None:
    config = tiny_config(data, tmp_path, health__on_spike="rollback")
    with pytest.raises(ValueError, match=r"health\.on_spike = rollback: needs checkpoints to go back to"):
        check_run(config)


def test_slow_ranks_are_named_slowest_first() -> None:
    reports = [("a", 1.0), ("b", 1.3), ("c", 0.9), ("d", 3.0), ("e", 1.0)]
    found = compare_ranks(reports, 25.0)
    assert [str(entry) for entry in found] == ["rank 3 on d by 200%", "rank 1 on b by 30%"]
    assert compare_ranks(reports, 250.0) == []
