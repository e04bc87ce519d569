"""Two ranks against one: the same losses, norms and weights at every ZeRO stage, with packed documents and experts."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import distributed_c10d

from amfm.data_pipeline.config import DataConfig
from amfm.pretrain.checkpoint.manifest_file import list_checkpoints
from amfm.pretrain.monitor.signals import SignalWatch
from amfm.pretrain.run import Run
from amfm.pretrain.start import close_run, start_run
from amfm.pretrain.step import train_step
from amfm.pretrain.step_sums import StepResult
from tests.helpers.spawn import run_ranks
from tests.helpers.spoiled_gradient import spoil_gradient
from tests.pretrain.tiny_run import Trained, collect_weights, read_events, tiny_config, train_and_collect

# float32 sums of another order: a few units in the last place of numbers around 1, and after AdamW's division of a
# weight's step (0.003) about as much again.
TOLERANCE = 1e-6
STEPS = 3
Stages = tuple[int, ...]  # of ZeRO
Alone = tuple[dict[int, Trained], list[Trained], Trained | None]
Pair = list[tuple[dict[int, Trained], Trained | None]]
STAGES = (0, 1, 2, 3)
QUICK, MORE = (1, 3), (0, 2)  # trained together


def train_stages(data: DataConfig, folder: str, stages: Stages) -> dict[int, Trained]:
    return {
        stage: train_and_collect(
            tiny_config(
                data,
                Path(folder, f"zero{stage}"),
                train__steps=STEPS,
                parallel__zero_stage=stage,
            )
        )
        for stage in stages
    }


def train_alone(data: DataConfig, folder: str, stages: Stages) -> Alone:
    return (
        train_stages(data, folder, stages),
        accumulate_both_ways(data, folder, "float32" if stages == QUICK else "bf16"),
        train_in_bf16(data, f"{folder}/bf16", 1) if stages == MORE else None,
    )


def train_as_two(data: DataConfig, folder: str, stages: Stages) -> tuple[dict[int, Trained], Trained | None]:
    return train_stages(data, folder, stages), train_in_bf16(data, f"{folder}/bf16", 2) if stages == MORE else None


@pytest.fixture(scope="module")
def alone(data: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Stages], Alone]:
    """Runs of one rank, in one process for the quick ones and in one for the others."""

    @cache
    def of(stages: Stages) -> Alone:
        return run_ranks(train_alone, data, str(tmp_path_factory.mktemp("one")), stages, num_ranks=1)[0]

    return of


@pytest.fixture(scope="module")
def pair(data: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Stages], Pair]:
    """The same of two ranks, in two processes."""

    @cache
    def of(stages: Stages) -> Pair:
        return run_ranks(train_as_two, data, str(tmp_path_factory.mktemp("two")), stages, num_ranks=2)

    return of


def assert_same_run(actual: Trained, expected: Trained) -> None:
    for key in ("loss", "grad_norm", "validation_loss"):
        if key in expected.metrics[-1]:
            last = slice(-1, None) if key == "validation_loss" else slice(None)
            values = [line[key] for line in actual.metrics[last]], [line[key] for line in expected.metrics[last]]
            assert values[0] == pytest.approx(values[1], rel=TOLERANCE), key
    assert actual.metrics[-1]["expert_load"] == expected.metrics[-1]["expert_load"]
    assert actual.metrics[-1]["auxiliary"] == pytest.approx(expected.metrics[-1]["auxiliary"], rel=1e-5)
    assert actual.weights.keys() == expected.weights.keys()
    for name, weight in expected.weights.items():
        torch.testing.assert_close(actual.weights[name], weight, rtol=0, atol=2 * TOLERANCE, msg=name)


@pytest.mark.parametrize("stage", [*QUICK, *(pytest.param(stage, marks=pytest.mark.slow) for stage in MORE)])
def test_two_ranks_train_as_one(alone: Callable[[Stages], Alone], pair: Callable[[Stages], Pair], stage: int) -> None:
    stages = QUICK if stage in QUICK else MORE
    one, (first, second) = alone(stages)[0][stage], (runs[stage] for runs, _ in pair(stages))
    assert len(one.metrics) == STEPS
    assert_same_run(first, one)
    for name, weight in first.weights.items():
        assert torch.equal(weight, second.weights[name]), f"ranks hold different {name}"


@pytest.mark.parametrize("groups", [(QUICK,), pytest.param((QUICK, MORE), marks=pytest.mark.slow)])
def test_stages_train_alike(alone: Callable[[Stages], Alone], groups: tuple[Stages, ...]) -> None:
    first, *others = (run for stages in groups for run in alone(stages)[0].values())
    for run in others:
        assert_same_run(run, first)


def train_in_bf16(data: DataConfig, folder: str, tensor: int) -> Trained:
    changes = {
        "train__steps": 3,
        "train__stop_after_steps": 1,
        "train__precision": "bf16",
        "parallel__zero_stage": 0,
        "parallel__tensor": tensor,
    }
    return train_and_collect(tiny_config(data, Path(folder), **changes))


@pytest.mark.slow
def test_the_norm_in_bf16_without_zero_is_that_of_all_tensor_ranks(
    alone: Callable[[Stages], Alone], pair: Callable[[Stages], Pair]
) -> None:
    runs = alone(MORE)[2], pair(MORE)[0][1]
    one, two = (run.metrics[0]["grad_norm"] for run in runs if run is not None)
    # Eight bits of each gradient; a rank's own share would be about seven tenths.
    assert two == pytest.approx(one, rel=0.02)


def test_router_bias_moved_against_the_load(alone: Callable[[Stages], Alone]) -> None:
    bias = next(weight for name, weight in alone(QUICK)[0][1].weights.items() if name.endswith("expert_bias"))
    assert 0 < float(bias.abs().max()) <= STEPS * 1e-3 * (1 + TOLERANCE)


def accumulate_both_ways(data: DataConfig, folder: str, precision: str) -> list[Trained]:
    # Auxiliary losses are means over micro-batches, so only their absence makes the cut invisible.
    runs = []
    for rows in (1, 4):
        # With AdamW's usual 1e-8 a gradient near zero turns its rounding into a step: one weight in 14,336 then
        # differs by 2.3e-6 on processors with AVX-512.
        place = Path(folder, f"{precision}-{rows}")
        config = tiny_config(data, place, train__micro_batch_size=rows, optimizer__epsilon=1e-5)
        moe = config.model.moe.model_copy(update={"auxiliary_loss_weight": 0.0, "z_loss_weight": 0.0})
        model = config.model.model_copy(update={"moe": moe})
        train = config.train.model_copy(update={"steps": STEPS, "precision": precision})
        runs.append(train_and_collect(config.model_copy(update={"model": model, "train": train})))
    return runs


def test_four_micro_batches_of_one_row_are_one_of_four(alone: Callable[[Stages], Alone]) -> None:
    assert_same_run(*alone(QUICK)[1])


@pytest.mark.slow
def test_four_micro_batches_in_bf16_are_one_of_four(alone: Callable[[Stages], Alone]) -> None:
    bf16_apart, bf16_together = alone(MORE)[1]
    # bf16 rounds activations the same way for one row as for four, but sums of gradients in another order: half a per cent
    # of the norm is an eighth of what summing four micro-batches in bf16 would cost at worst (4 x 2^-8).
    assert bf16_apart.series("loss") == pytest.approx(bf16_together.series("loss"), rel=2e-3)
    assert bf16_apart.series("grad_norm") == pytest.approx(bf16_together.series("grad_norm"), rel=5e-3)


def poison_last_rank(data: DataConfig, folder: str, stage: int, precision: str) -> tuple[list[StepResult], Any]:
    config = tiny_config(
        data, Path(folder, f"{stage}-{precision}"), parallel__zero_stage=stage, train__precision=precision
    )
    with SignalWatch() as signals:
        run = start_run(config, signals)
        before = collect_weights(run)
        first = poison_gradient(run)
        after = collect_weights(run)
        second = train_step(run)
        moved = collect_weights(run)
        counters = sorted({int(state["step"]) for state in run.engine.adamw.state.values()})
        close_run(run)
    unchanged = all(torch.equal(before[name], after[name]) for name in before)
    changed = any(not torch.equal(after[name], moved[name]) for name in after)
    return [first, second], (unchanged, changed, counters)


def poison_gradient(run: Run) -> StepResult:
    """One step in which only the last rank has a NaN in the gradient of one matrix."""
    victim = dict(run.model.named_parameters())["blocks.3.mixer.down_proj.weight"]
    is_last = run.parallel.rank == run.parallel.world_size - 1
    stop = spoil_gradient(victim, lambda gradient: gradient * float("nan") if is_last else gradient)
    result = train_step(run)
    stop()
    return result


def poison_all(data: DataConfig, folder: str, cases: list[tuple[int, str]]) -> list[Any]:
    return [poison_last_rank(data, folder, stage, precision) for stage, precision in cases]


@pytest.mark.parametrize(
    ("stages", "precisions"),
    [
        (MORE, ("float32", "float32")),
        pytest.param(STAGES, ("bf16", "float32"), marks=pytest.mark.slow),
        pytest.param(STAGES, ("float32", "bf16"), marks=pytest.mark.slow),
    ],
    ids=["quick", "bf16-float32", "float32-bf16"],
)
def test_nan_on_one_rank_skips_the_step_on_both(
    data: DataConfig, tmp_path: Path, stages: tuple[int, ...], precisions: tuple[str, str]
) -> None:
    # Each stage and each precision; but for two, the stages that are not trained quickly to their end, those are slow.
    ranks = run_ranks(poison_all, data, str(tmp_path), list(zip(stages, precisions * 2)), num_ranks=2)
    for results, (unchanged, changed, counters) in [case for rank in ranks for case in rank]:
        assert [result.applied for result in results] == [False, True]
        assert unchanged, "a skipped step moved weights or the router's bias"
        assert changed, "the step after a skipped one moved nothing"
        assert counters == [1], "AdamW counts only steps that were taken"
        skip = results[0].skip
        assert skip is not None and skip["sample_ids"] == [0, 1, 2, 3]
        fault = {"rank": 1, "parameter": "blocks.3.mixer.down_proj.weight", "num_parameters": 1}
        assert skip["faults"] == [fault]
        assert math.isfinite(results[0].loss), "the loss itself was fine"


def hang_last_rank(data: DataConfig, folder: str) -> str:
    """The last rank stays away from a step until the other one has given up on it, which says why."""
    given_up = Path(folder, "given up")
    config = tiny_config(data, Path(folder), train__timeout_seconds=1234, parallel__zero_stage=2)
    set_timeout = getattr(
        distributed_c10d, "set_timeout", distributed_c10d._set_pg_timeout
    )  # older releases have only the second
    with SignalWatch() as signals:
        run = start_run(config, signals)
        train_step(run)  # of a busy machine and compilers, before the time of what follows is short
        for group in distributed_c10d._world.pg_map:
            assert group._get_backend(torch.device("cpu")).options._timeout == timedelta(seconds=1234)
            set_timeout(timedelta(seconds=4), group)
        if run.parallel.rank == 1:
            while not given_up.exists():
                time.sleep(0.05)
            return "waited"
        with pytest.raises(RuntimeError) as error:
            train_step(run)
        given_up.touch()
        return str(error.value)


def test_a_hung_rank_is_noticed_after_the_configured_time(data: DataConfig, tmp_path: Path) -> None:
    reason, other = run_ranks(hang_last_rank, data, str(tmp_path), num_ranks=2)
    assert "imed out waiting 4000ms" in reason and other == "waited"


def stop_hopeless_run(data: DataConfig, folder: str) -> tuple[int, list[Any]]:
    """Weights of infinity make every gradient NaN."""
    from amfm.pretrain.train import run_steps

    config = tiny_config(data, Path(folder), train__max_skipped_steps=2, train__steps=9)
    with SignalWatch() as signals:
        run = start_run(config, signals)
        with torch.no_grad():
            run.model.final_norm.weight.fill_(float("inf"))
        code = run_steps(run)
        close_run(run)
    return code, read_events(Path(folder)) if run.parallel.is_main else []


def test_run_gives_up_after_too_many_bad_steps(data: DataConfig, tmp_path: Path) -> None:
    (code, events), (other_code, _) = run_ranks(stop_hopeless_run, data, str(tmp_path), num_ranks=2)
    assert code == other_code == 3
    skips = [event for event in events if event["event"] == "skipped_step"]
    assert [skip["sample_ids"] for skip in skips] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert events[-1]["event"] == "gave_up" and not list_checkpoints(tmp_path / "checkpoints")
