"""Consecutive stages: how they resolve, what is rejected, and a run that crosses four of them and resumes in each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from amfm.data_pipeline.config import DataConfig
from amfm.pretrain.checks.check_run import check_run
from amfm.pretrain.config.errors import ConfigError
from amfm.pretrain.config.schema import RunConfig
from amfm.pretrain.inference.weights import read_weights
from amfm.pretrain.monitor.signals import SignalWatch
from amfm.pretrain.run import apply_stage
from amfm.pretrain.saving import restore_newest_weights
from amfm.pretrain.stages import (
    data_of_stages,
    resolve_stages,
    stage_of,
    step_of_sample,
    total_steps,
)
from amfm.pretrain.start import close_run, start_run
from amfm.pretrain.step import train_step
from amfm.pretrain.train import run_steps
from tests.helpers.tiny_store import make_tiny_store
from tests.pretrain.tiny_run import MODEL, Trained, read_events, tiny_config, train_and_collect

ATTENTION = {**MODEL["attention"], "positions": "rope"}
# The stages of Hunyuan-TurboS (arXiv 2505.15431) at toy size: pretraining, annealing with another mixture, and two
# lengths with NTK-aware positions at a constant rate.
STAGES: list[dict[str, Any]] = [
    {"name": "pretraining", "steps": 3},
    {
        "name": "annealing",
        "steps": 3,
        "weights": {"source0": 1.0, "source1": 3.0},
        "global_batch_size": 6,
        "schedule": {"kind": "cosine", "warmup_steps": 0, "min_ratio": 0.02},
    },
    {
        "name": "long",
        "tokens": 3 * 4 * 256,
        "sequence_length": 256,
        "global_batch_size": 4,
        "rope": {"scaling": "ntk", "ntk_alpha": 50},
        "learning_rate": 6e-5,
        "schedule": {"kind": "constant", "warmup_steps": 0},
    },
    {
        "name": "longest",
        "tokens": 3 * 2 * 1024,
        "sequence_length": 1024,
        "micro_batch_size": 1,
        "global_batch_size": 2,
        "rope": {"scaling": "ntk", "ntk_alpha": 1000},
        "learning_rate": 6e-5,
        "schedule": {"kind": "constant", "warmup_steps": 0},
    },
]


@pytest.fixture(scope="module")
def two_sources(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    return make_tiny_store(tmp_path_factory.mktemp("data"), num_documents=400, mean_words=60, num_sources=2)


def staged(data: DataConfig, run_dir: Path, stages: list[dict[str, Any]] = STAGES, **overrides: Any) -> RunConfig:
    settings = {"train__sequence_length": 128, "model__attention": ATTENTION, "model__pattern": "E*-", **overrides}
    config = tiny_config(data, run_dir, **settings)
    tree = config.model_dump(mode="json", exclude_unset=True) | {"stages": stages}
    tree["train"].pop("steps")
    return RunConfig.model_validate(tree)


def test_what_a_stage_leaves_open_is_as_before_it(two_sources: DataConfig, tmp_path: Path) -> None:
    stages = resolve_stages(staged(two_sources, tmp_path))
    assert [stage.first_step for stage in stages] == [0, 3, 6, 9]
    assert [stage.train.sequence_length for stage in stages] == [128, 128, 256, 1024]
    assert [stage.train.global_batch_size for stage in stages] == [4, 6, 4, 2]
    assert [stage.train.micro_batch_size for stage in stages] == [2, 2, 2, 1]
    assert [stage.first_sample for stage in stages] == [0, 12, 30, 42]
    assert [stage.config.model.attention.rope.ntk_alpha for stage in stages] == [None, None, 50, 1000]
    assert [stage_of(stages, done).name for done in (0, 2, 3, 11, 12)] == [
        *("pretraining", "pretraining", "annealing", "longest", "longest")
    ]
    assert [stage.num_tokens() for stage in stages] == [12 * 128, 18 * 128, 12 * 256, 6 * 1024]
    assert stages[1].samples_before(5) == 6


def test_stages_become_phases_of_the_data(two_sources: DataConfig, tmp_path: Path) -> None:
    config = staged(two_sources, tmp_path)
    phases = data_of_stages(config, resolve_stages(config)).phases
    assert [(phase.start_sample, phase.weights, phase.sequence_length) for phase in phases] == [
        (12, {"source0": 1.0, "source1": 3.0}, None),
        (30, None, 256),
        (42, None, 1024),
    ]


def test_a_ramp_grows_in_equal_shares_and_is_counted(two_sources: DataConfig, tmp_path: Path) -> None:
    ramp = {"start_size": 2, "increment": 2, "steps": 6}
    config = tiny_config(
        two_sources,
        tmp_path,
        train__steps=9,
        train__global_batch_size=8,
        train__micro_batch_size=1,
        train__batch_ramp=ramp,
    )
    check_run(config, 2)
    stages = resolve_stages(config)
    sizes = [stages[0].batch_size(step) for step in range(1, 10)]
    assert sizes == [2, 2, 4, 4, 6, 6, 8, 8, 8]
    assert stages[0].num_tokens() == sum(sizes) * config.train.sequence_length
    taken = [(step, row) for step, size in enumerate(sizes, start=1) for row in range(size)]
    assert [step_of_sample(stages, sample) for sample in range(len(taken))] == taken


def test_tokens_of_a_ramped_stage_make_enough_steps(two_sources: DataConfig, tmp_path: Path) -> None:
    for samples, steps in ((2, 1), (5, 3), (24, 6), (25, 7), (33, 8)):
        config = staged(
            two_sources,
            tmp_path,
            [{"name": "one", "tokens": samples * 128}],
            train__global_batch_size=8,
            train__micro_batch_size=1,
            train__batch_ramp={"start_size": 2, "increment": 2, "steps": 6},
        )
        assert total_steps(config) == steps


@pytest.mark.parametrize(
    ("change", "overrides", "message"),
    [
        ({"tokens": 10.0}, {}, r"stages\.1: has both tokens and steps; give it one of them"),
        ({"name": "pretraining"}, {}, r"stages\.1\.name = pretraining: is also the name of stages\.0"),
        (
            {"weights": {"web": 1.0}},
            {},
            r"stages\.1\.weights\.web: is not a name of data\.sources; use one of source0, source1",
        ),
        (
            {"global_batch_size": 5},
            {},
            r"stages\.1\.global_batch_size = 5: in stage annealing: must be a multiple of train\.micro_batch_size=2",
        ),
        (
            {"schedule": {"kind": "wsd", "warmup_steps": 3}},
            {},
            r"stages\.1\.schedule\.warmup_steps = 3: in stage annealing",
        ),
        ({"rope": {"ntk_alpha": 50}}, {}, r"ntk_alpha"),
        ({}, {"train__steps": 13}, r"train\.steps = 13: is not the sum of the stages, 12; remove it"),
        ({}, {"train__stop_after_steps": 13}, r"is beyond the 12 steps of the stages"),
        (
            {"rope": {"scaling": "ntk", "ntk_alpha": 50}},
            {"model__attention": MODEL["attention"]},
            r"stages\.1\.rope: has no effect: model\.attention\.positions is none",
        ),
    ],
)
def test_a_bad_stage_is_named_with_its_rule(
    change: dict[str, Any], overrides: dict[str, Any], message: str, two_sources: DataConfig, tmp_path: Path
) -> None:
    stages = [stage | change if index == 1 else stage for index, stage in enumerate(STAGES)]
    steps = overrides.pop("train__steps", None)
    config = staged(two_sources, tmp_path, stages, **overrides)
    if steps is not None:
        config = config.model_copy(update={"train": config.train.model_copy(update={"steps": steps})})
    with pytest.raises(ValueError, match=message):
        check_run(config, 1)


def test_a_run_has_steps_or_stages(two_sources: DataConfig, tmp_path: Path) -> None:
    config = staged(two_sources, tmp_path, [])
    with pytest.raises(ValueError, match=r"train\.steps: is missing; set train\.steps, or declare stages"):
        check_run(config)


@pytest.mark.parametrize(
    ("ramp", "message"),
    [
        (
            {"start_size": 4, "increment": 2, "steps": 2},
            r"batch_ramp\.start_size = 4: must be less than the global batch",
        ),
        ({"start_size": 1, "increment": 2, "steps": 2}, r"batch_ramp\.increment = 2: must lead from 1 to 4 rows"),
        (
            {"start_size": 2, "increment": 1, "steps": 2},
            r"batch_ramp\.increment = 1: must be a multiple of micro-batch",
        ),
        (
            {"start_size": 2, "increment": 2, "steps": 4},
            r"batch_ramp\.steps = 4: must be less than the 4 steps of the run",
        ),
    ],
)
def test_a_ramp_that_leads_nowhere_is_refused(
    ramp: dict[str, int], message: str, two_sources: DataConfig, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        check_run(tiny_config(two_sources, tmp_path, train__batch_ramp=ramp), 1)


def test_what_is_wrong_in_every_stage_alike_is_said_once(two_sources: DataConfig, tmp_path: Path) -> None:
    config = staged(two_sources, tmp_path)
    with pytest.raises(ConfigError) as caught:
        check_run(config.model_copy(update={"model": config.model.model_copy(update={"pattern": "MQ"})}))
    assert [problem.key for problem in caught.value.problems] == ["model.pattern"]
    assert "in stage" not in str(caught.value)


@pytest.mark.timeout(2000)
@pytest.mark.parametrize("stops", [(4, 6, None), pytest.param((2, 4, 6, 8, 10, 11, None), marks=pytest.mark.slow)])
def test_a_run_across_four_stages_resumes_bitwise_inside_each(
    two_sources: DataConfig, tmp_path: Path, stops: tuple[int | None, ...]
) -> None:
    straight = train_and_collect(staged(two_sources, tmp_path / "straight"))
    assert [line["stage"] for line in straight.metrics[::3]] == ["pretraining", "annealing", "long", "longest"]
    assert straight.metrics[-1]["tokens"] == 12 * 128 + 18 * 128 + 12 * 256 + 6 * 1024
    assert straight.series("lr")[-6:] == [6e-5] * 6

    resumed: Trained | None = None
    for stop in stops:  # after the sixth a stage begins
        resumed = train_and_collect(
            staged(two_sources, tmp_path / "resumed", train__stop_after_steps=stop, train__validate_every_steps=4)
        )
    assert resumed is not None
    for key in ("step", "loss", "grad_norm", "lr", "tokens", "stage", "auxiliary"):
        assert resumed.series(key) == straight.series(key), key
    events = [
        [(event["step"], event["name"]) for event in read_events(tmp_path / run, "stage")]
        for run in ("straight", "resumed")
    ]
    assert events[0] == events[1] == [(3, "annealing"), (6, "long"), (9, "longest")]
    for name, weight in straight.weights.items():
        assert torch.equal(resumed.weights[name], weight), name

    weights = read_weights(tmp_path / "resumed")
    stages = resolve_stages(staged(two_sources, tmp_path))
    assert weights.model == stages[-1].config.model
    assert weights.trained_length() == 1024 and weights.tokens == straight.metrics[-1]["tokens"]


def test_losses_of_another_stage_are_forgotten_on_entering_and_on_rolling_back(
    two_sources: DataConfig, tmp_path: Path
) -> None:
    config = staged(two_sources, tmp_path, train__stop_after_steps=3, health__on_spike="stop")
    with SignalWatch() as signals:
        run = start_run(config, signals)
        assert run_steps(run) == 0 and len(run.progress.recent_losses) == 3
        close_run(run)
        run = start_run(config, signals)
        assert len(run.progress.recent_losses) == 3
        apply_stage(run)
        assert run.progress.recent_losses == []
        train_step(run)
        assert restore_newest_weights(run) == 3 and run.progress.recent_losses == []
        close_run(run)


def test_a_stage_to_come_may_change_and_one_that_has_begun_may_not(two_sources: DataConfig, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    train_and_collect(staged(two_sources, run_dir, train__stop_after_steps=4))
    later = [*STAGES[:2], STAGES[2] | {"learning_rate": 3e-5, "tokens": 2 * 4 * 256}]
    begun = [STAGES[0], STAGES[1] | {"weights": {"source0": 1.0, "source1": 1.0}}, *STAGES[2:]]
    with pytest.raises(ValueError, match=r"stages\.1 \(annealing\): weights: the checkpoint has .*3\.0.*this run has"):
        train_and_collect(staged(two_sources, run_dir, begun))
    changed = train_and_collect(staged(two_sources, run_dir, later))
    assert changed.series("step") == list(range(1, 9))
    assert changed.series("lr")[-2:] == [3e-5] * 2
