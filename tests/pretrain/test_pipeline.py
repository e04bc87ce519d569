"""Two pipeline stages against one rank, through the whole run: metrics, validation, resume, bad gradients, row lengths."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from amfm.data_pipeline.config import DataConfig
from amfm.pretrain.config.schema import RunConfig
from amfm.pretrain.monitor.signals import SignalWatch
from amfm.pretrain.start import close_run, start_run
from amfm.pretrain.step import train_step
from amfm.pretrain.step_sums import StepResult
from tests.helpers.spawn import run_ranks
from tests.helpers.spoiled_gradient import spoil_gradient
from tests.pretrain.tiny_run import Trained, collect_weights, tiny_config, train_and_collect

# The same operations on the same numbers in the same order, but for reductions over ranks.
TOLERANCE = 1e-6
ONE_ROW = {"train__micro_batch_size": 1}  # four in a step
SCHEDULES: dict[str, dict[str, Any]] = {
    "1f1b": {},
    "interleaved": {"parallel__schedule": "interleaved", "parallel__virtual_stages": 2},
    "zero_bubble": {"parallel__schedule": "zero_bubble"},
}


class Stage(NamedTuple):
    """What one of two stages, which do all of this in one process each, ended with."""

    interleaved: Trained
    resumed: Trained
    poisoned: tuple[list[StepResult], bool, bool, int]
    two_lengths: Trained


class More(NamedTuple):
    """The slow part."""

    schedules: dict[str, Trained]
    in_bf16: dict[str, Trained]
    starts: list[Trained]


TWO: dict[str, Any] = {"parallel__pipeline": 2}


def train_as_stage(data: DataConfig, folder: str) -> Stage:
    interleaved = ONE_ROW | TWO | SCHEDULES["interleaved"]
    return Stage(
        *train_in_two_starts(data, f"{folder}/starts", interleaved),
        poison_first_stage(data, f"{folder}/poisoned"),  # 1f1b
        train_two_lengths(data, f"{folder}/lengths", TWO | SCHEDULES["zero_bubble"]),
    )


def train_more(data: DataConfig, folder: str) -> More:
    short = TWO | {"train__precision": "bf16", "train__steps": 2, "schedule__warmup_steps": 1}
    tied = ONE_ROW | TWO | {"parallel__zero_stage": 2, "model__tie_embeddings": True}
    return More(
        train_schedules(data, f"{folder}/float32", TWO, ["1f1b", "zero_bubble"]),
        train_schedules(data, f"{folder}/bf16", short, ["1f1b", "zero_bubble"]),
        train_in_two_starts(data, f"{folder}/starts", tied),
    )


def train_alone(data: DataConfig, folder: str) -> tuple[Trained, Trained]:
    one = train_and_collect(tiny_config(data, Path(folder, "one"), **ONE_ROW))
    return one, train_two_lengths(data, f"{folder}/lengths", {})


@pytest.fixture(scope="module")
def stages(data: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> list[Stage]:
    return run_ranks(train_as_stage, data, str(tmp_path_factory.mktemp("stages")), num_ranks=2)


@pytest.fixture(scope="module")
def more(data: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> list[More]:
    return run_ranks(train_more, data, str(tmp_path_factory.mktemp("more")), num_ranks=2)


@pytest.fixture(scope="module")
def alone(data: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[Trained, Trained]:
    """The run, and the one with two lengths of rows, on one rank."""
    return run_ranks(train_alone, data, str(tmp_path_factory.mktemp("alone")), num_ranks=1)[0]


def train_schedules(
    data: DataConfig, folder: str, settings: dict[str, Any], names: Sequence[str]
) -> dict[str, Trained]:
    return {
        name: train_and_collect(tiny_config(data, Path(folder, name), **ONE_ROW, **settings, **SCHEDULES[name]))
        for name in names
    }


def join(ranks: list[Trained]) -> Trained:
    """The main rank's metrics with the weights of all stages."""
    weights: dict[str, torch.Tensor] = {}
    for rank in ranks:
        weights |= rank.weights
    return Trained(ranks[0].code, ranks[0].metrics, weights)


def assert_same_run(actual: Trained, expected: Trained) -> None:
    assert actual.code == expected.code == 0
    assert len(actual.metrics) == len(expected.metrics)
    for own, other in zip(actual.metrics, expected.metrics, strict=True):
        for key in ("loss", "grad_norm"):
            assert own[key] == pytest.approx(other[key], rel=TOLERANCE), key
        assert own["auxiliary"] == pytest.approx(other["auxiliary"], rel=1e-5)
        for key in ("tokens", "expert_load", "skipped", "lr"):
            assert own[key] == other[key]
    assert actual.metrics[-1]["validation_loss"] == pytest.approx(
        expected.metrics[-1]["validation_loss"], rel=TOLERANCE
    )
    assert actual.weights.keys() == expected.weights.keys()
    for name, weight in expected.weights.items():
        torch.testing.assert_close(actual.weights[name], weight, rtol=0, atol=2 * TOLERANCE, msg=name)


def assert_split(both: list[Trained], alone: Trained) -> None:
    assert_same_run(join(both), alone)
    assert not set(both[0].weights) & set(both[1].weights), "a weight is on both stages"
    assert both[1].metrics == [], "only the main rank, where no loss is computed, writes"


def test_a_run_of_two_stages_is_the_run_of_one_rank(stages: list[Stage], alone: tuple[Trained, Trained]) -> None:
    assert_split([stage.interleaved for stage in stages], alone[0])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["1f1b", "zero_bubble"])
def test_each_schedule_is_the_run_of_one_rank(more: list[More], alone: tuple[Trained, Trained], name: str) -> None:
    assert_split([stage.schedules[name] for stage in more], alone[0])


def train_in_two_starts(data: DataConfig, folder: str, settings: dict[str, Any]) -> list[Trained]:
    whole = train_and_collect(tiny_config(data, Path(folder, "whole"), **settings))
    train_and_collect(tiny_config(data, Path(folder, "parts"), **settings, train__stop_after_steps=2))
    return [whole, train_and_collect(tiny_config(data, Path(folder, "parts"), **settings))]


def test_a_resumed_pipeline_goes_on_to_the_bit(stages: list[Stage]) -> None:
    for stage in stages:
        for name, weight in stage.interleaved.weights.items():
            assert torch.equal(weight, stage.resumed.weights[name]), name


@pytest.mark.slow
def test_a_resumed_pipeline_with_tied_embeddings_goes_on_to_the_bit(more: list[More]) -> None:
    for whole, parts in (stage.starts for stage in more):
        for name, weight in whole.weights.items():
            assert torch.equal(weight, parts.weights[name]), name
    tied = [stage.starts[0].weights["embedding.weight"] for stage in more]
    assert torch.equal(*tied), "the two ends of the pipeline hold different embeddings"


@pytest.mark.slow
def test_bf16_gradients_of_split_backward_passes_are_summed_in_float32(more: list[More]) -> None:
    # 1f1b sums through autograd's hooks; zero_bubble computes gradients of weights past them, in the same order.
    for stage in more:
        for name, weight in stage.in_bf16["1f1b"].weights.items():
            assert torch.equal(weight, stage.in_bf16["zero_bubble"].weights[name]), name


def count_received(run: Any) -> int:
    """Numbers of streams and gradients that a stage has received and still holds."""
    stage = run.pipeline._schedule._stage
    received = [*stage.args_recv_info.values(), *stage.grad_recv_info.values()]
    buffers = [entry.buffer for entries in received for entry in entries]
    return sum(buffer.numel() for buffer in buffers if buffer is not None)


def poison_first_stage(data: DataConfig, folder: str) -> tuple[list[StepResult], bool, bool, int]:
    config = tiny_config(data, Path(folder), **ONE_ROW, parallel__pipeline=2)
    with SignalWatch() as signals:
        run = start_run(config, signals)
        before = collect_weights(run)
        victim = dict(run.model.named_parameters()).get("blocks.0.mixer.out_proj.weight")
        stop = None if victim is None else spoil_gradient(victim, lambda gradient: gradient * float("nan"))
        results = [train_step(run)]
        skipped = collect_weights(run)
        if stop is not None:
            stop()
        results.append(train_step(run))
        after, received = collect_weights(run), count_received(run)
        close_run(run)
    unchanged = all(torch.equal(before[name], skipped[name]) for name in before)
    return results, unchanged, any(not torch.equal(skipped[name], after[name]) for name in before), received


def test_a_bad_gradient_on_one_stage_skips_the_step_on_all(stages: list[Stage]) -> None:
    for results, unchanged, changed, received in (stage.poisoned for stage in stages):
        assert received == 0, "a stage holds buffers of micro-batches that are over"
        assert [result.applied for result in results] == [False, True]
        assert unchanged and changed
        skip = results[0].skip
        assert skip is not None
        assert skip["faults"] == [{"rank": 0, "parameter": "blocks.0.mixer.out_proj.weight", "num_parameters": 1}]
        assert skip["sample_ids"] == list(range(4)) and skip["samples_with_bad_loss"] == []


def two_lengths(config: RunConfig) -> RunConfig:
    """The rows of the last two steps are half as long."""
    tree = config.model_dump(mode="json")
    tree["data"]["phases"] = [{"start_sample": 8, "sequence_length": 24}]
    return RunConfig.model_validate(tree)


def train_two_lengths(data: DataConfig, folder: str, settings: dict[str, Any]) -> Trained:
    return train_and_collect(two_lengths(tiny_config(data, Path(folder), **ONE_ROW, **settings)))


def test_a_pipeline_follows_rows_that_change_their_length(stages: list[Stage], alone: tuple[Trained, Trained]) -> None:
    assert alone[1].metrics[-1]["tokens"] == 2 * 4 * (48 + 24)
    assert_same_run(join([stage.two_lengths for stage in stages]), alone[1])
