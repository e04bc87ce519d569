"""What follows from a loss that jumps and gradients that are not finite, and who is called slow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from amfm.data_pipeline.config import DataConfig
from amfm.model.config.schema import ModelConfig
from amfm.pretrain.checks.check_run import check_run
from amfm.pretrain.config.file import load_config
from amfm.pretrain.config.schema import HealthConfig
from amfm.pretrain.monitor.anomalies import EXPERT_STEPS, describe_unbalanced, find_collapsed, judge_loss, remember
from amfm.pretrain.monitor.signals import SignalWatch
from amfm.pretrain.monitor.stragglers import compare_ranks
from amfm.pretrain.saving import restore_newest_weights, save
from amfm.pretrain.start import close_run, start_run
from amfm.pretrain.step import train_step
from amfm.pretrain.train import run_steps
from tests.helpers.spawn import run_ranks
from tests.pretrain.tiny_run import MODEL, Trained, collect_weights, read_events, read_metrics, tiny_config

BLOW_STEP = 9
SETTINGS: dict[str, Any] = {
    "model__pattern": "E-",
    "train__steps": 14,
    "train__checkpoint_every_steps": 20,
    "health__spike_window": 8,
    "health__spike_ratio": 1.15,
}
CONFIGS = Path(__file__).parents[3] / "configs"


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


def test_a_block_collapses_when_its_fullest_expert_takes_nearly_every_token() -> None:
    counts = {1: [50, 50, 50, 50], 4: [100, 97, 2, 1], 7: [85, 85, 15, 15]}
    assert find_collapsed(counts, top_k=2) == {4: 1.0}
    assert find_collapsed({1: [10, 10, 10, 9]}, top_k=4) == {}, "every expert takes every token by design"
    assert find_collapsed({1: [0, 0, 0, 0]}, top_k=2) == {}


def model_with(**changes: Any) -> ModelConfig:
    """The tiny model without any balancing, changed."""
    plain = {"expert_bias": False, "auxiliary_loss_weight": 0.0}
    return ModelConfig.model_validate({**MODEL, "moe": {**MODEL["moe"], **plain, **changes}})


@pytest.mark.parametrize(
    "changes",
    [
        {"expert_bias": True},
        {"auxiliary_loss_weight": 1e-3},
        {"sequence_loss_weight": 1e-4},
        {"top_k": 4},
        {"capacity_factor": 1.5, "overflow": "recycle"},
    ],
)
def test_settings_that_balance_are_left_alone(changes: dict[str, Any]) -> None:
    assert describe_unbalanced(model_with(**changes)) is None


def test_what_would_balance_is_named_as_the_router_allows() -> None:
    assert "model.moe.expert_bias=true" in str(describe_unbalanced(model_with()))
    assert describe_unbalanced(model_with(expert_bias=True, bias_update_rate=0.0)) is not None
    softmax = str(describe_unbalanced(model_with(router="softmax")))
    assert "auxiliary_loss_weight" in softmax and "expert_bias" not in softmax


def test_a_run_says_at_its_start_that_nothing_balances_and_once_that_a_block_collapsed(
    data: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moe = model_with(expert_bias=True, bias_update_rate=0.0).model_dump(mode="json")["moe"]
    with SignalWatch() as signals:
        given = {"train__steps": 2 * EXPERT_STEPS, "model__moe": moe, "model__pattern": "-E"}
        run = start_run(tiny_config(data, tmp_path, **given), signals)
        bias = next(buffer for name, buffer in run.model.named_buffers() if name.endswith("expert_bias"))
        bias.copy_(torch.tensor([9.0, 9.0, 0.0, 0.0]))
        assert run_steps(run) == 0
        close_run(run)
    said = capsys.readouterr().err
    assert "warning: nothing balances the 4 experts" in said
    assert (
        said.count("routing has collapsed: the same experts receive nearly all tokens in block 1 (100% of tokens)") == 1
    )
    assert len(read_events(tmp_path, "unbalanced_experts")) == 1
    collapsed = read_events(tmp_path, "experts_collapsed")
    assert [(event["step"], event["token_share"]) for event in collapsed] == [(EXPERT_STEPS, {"1": 1.0})]


def test_every_preset_balances_its_experts() -> None:
    for path in sorted(CONFIGS.glob("*.yaml")):
        assert describe_unbalanced(load_config(path).model) is None, path.name
