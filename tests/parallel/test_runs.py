"""Whole runs of two ranks on every axis: bf16, bad gradients and signals that all agree on, validation over a restart."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

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
from tests.parallel.layouts import Layout, gather_weights, layout_config, outcomes_of
from tests.pretrain.tiny_run import Trained, tiny_config, train_and_collect

TENSOR = {"tensor": 2, "sequence_parallel": True}
BF16 = {"train__precision": "bf16"}


@pytest.mark.parametrize(
    "parallels",
    [
        pytest.param([TENSOR | {"zero_stage": 3}], id="tensor, whose weights are spread"),
        pytest.param([{"context": 2}], id="context", marks=pytest.mark.slow),
        pytest.param([TENSOR | {"zero_stage": stage} for stage in (0, 1)], id="tensor", marks=pytest.mark.slow),
        pytest.param([{"expert": 2, "zero_stage": stage} for stage in (1, 2)], id="expert", marks=pytest.mark.slow),
    ],
)
def test_bf16_losses_and_norms_are_those_of_one_rank(parallels: list[dict[str, Any]]) -> None:
    outcomes = outcomes_of([Layout(2, parallel, settings=BF16, quick=True) for parallel in parallels])
    (expected,) = outcomes_of([Layout(1, settings=BF16, quick=True)])
    for outcome in outcomes:
        # Where one rank continues with float32, parts of sums, an expert's output before its weight and scans without
        # their carried state are rounded to bf16 (2^-9); two such in a step of the residual stream.
        assert outcome.losses == pytest.approx(expected.losses, rel=2e-3)
        assert outcome.grad_norms == pytest.approx(expected.grad_norms, rel=2e-2)


# Layout, precision, and the weight whose gradient is bad on the last rank.
Poisoned = list[tuple[dict[str, Any], str, str]]
POISONED: Poisoned = [
    ({"expert": 2, "zero_stage": 2}, "bf16", "blocks.1.mixer.experts.down"),
]
POISONED_MORE: Poisoned = [
    (TENSOR | {"zero_stage": 3}, "float32", "blocks.3.mixer.down_proj.weight"),
    (TENSOR | {"zero_stage": 0}, "bf16", "blocks.3.mixer.down_proj.weight"),
    ({"context": 2}, "float32", "blocks.0.mixer.out_proj.weight"),
    (TENSOR | {"zero_stage": 0}, "float32", "blocks.3.mixer.down_proj.weight"),
    (TENSOR | {"zero_stage": 1}, "bf16", "blocks.3.mixer.down_proj.weight"),
    ({"expert": 2, "zero_stage": 1}, "float32", "blocks.1.mixer.experts.down"),
    ({"expert": 2, "zero_stage": 1}, "bf16", "blocks.1.mixer.experts.down"),
]


def poison_and_signal(config: RunConfig, victim: str) -> tuple[StepResult, bool, StepResult]:
    """A step with a bad gradient on the last rank, whether it left all weights as they were, and one with a signal there."""
    with SignalWatch() as signals:
        run = start_run(config, signals)
        is_last = run.parallel.rank == run.parallel.world_size - 1
        before = gather_weights(run)
        parameter = dict(run.model.named_parameters())[victim]
        stop = spoil_gradient(parameter, lambda gradient: gradient * float("nan") if is_last else gradient)
        poisoned = train_step(run)
        stop()
        unmoved = all(torch.equal(tensor, before[name]) for name, tensor in gather_weights(run).items())
        if is_last:
            signals.received = signal.SIGTERM
        signalled = train_step(run)
        close_run(run)
    return poisoned, unmoved, signalled


def poison_all(cases: Poisoned, data: DataConfig, folder: str) -> list[tuple[StepResult, bool, StepResult]]:
    results = []
    for number, (parallel, precision, victim) in enumerate(cases):
        layout = Layout(2, parallel, settings={"train__precision": precision}, quick=True)
        results.append(poison_and_signal(layout_config(layout, data, Path(folder, str(number))), victim))
    return results


@pytest.mark.parametrize("cases", [POISONED, pytest.param(POISONED_MORE, marks=pytest.mark.slow)], ids=["some", "more"])
def test_a_bad_gradient_or_a_signal_on_one_rank_is_known_to_both(
    cases: Poisoned, data: DataConfig, tmp_path: Path
) -> None:
    for results in run_ranks(poison_all, cases, data, str(tmp_path), num_ranks=2):
        for (parallel, _, victim), (poisoned, unmoved, signalled) in zip(cases, results, strict=True):
            flags = [poisoned.applied, unmoved, signalled.applied]
            assert flags == [False, True, True], "the poisoned step moved nothing, the next one did"
            assert [poisoned.signal, signalled.signal] == [0, signal.SIGTERM]
            assert poisoned.skip is not None
            assert poisoned.skip["sample_ids"] == list(range(4)), parallel
            assert poisoned.skip["faults"] == [{"rank": 1, "parameter": victim, "num_parameters": 1}]


def run_validated(data: DataConfig, folder: str, context: int, restarts: bool) -> Trained:
    """Four steps; where it `restarts`, two of them, a checkpoint, and the rest in a second start."""
    settings = {
        "train__validate_every_steps": 2,
        "optimizer__epsilon": 1e-5,
        "optimizer__learning_rate": 1e-3,
        "parallel__context": context,
    }
    if restarts:
        train_and_collect(tiny_config(data, Path(folder), **settings, train__stop_after_steps=2))
    return train_and_collect(tiny_config(data, Path(folder), **settings))


@pytest.mark.parametrize("restarts", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_context_ranks_validate_as_one_rank_in_one_start_and_over_two(
    data: DataConfig, tmp_path: Path, restarts: bool
) -> None:
    (cut, _) = run_ranks(run_validated, data, str(tmp_path / "two"), 2, restarts, num_ranks=2)
    (whole,) = run_ranks(run_validated, data, str(tmp_path / "one"), 1, restarts, num_ranks=1)
    assert cut.code == whole.code == 0
    # float32 sums in another order.
    for key in ("loss", "grad_norm"):
        assert cut.series(key) == pytest.approx(whole.series(key), rel=1e-5)
    for own, other in zip(cut.metrics, whole.metrics, strict=True):
        assert own["expert_load"] == other["expert_load"]
        assert own["auxiliary"] == pytest.approx(other["auxiliary"], rel=1e-5)
        assert own.get("validation_loss", 0.0) == pytest.approx(other.get("validation_loss", 0.0), rel=1e-5)
        by_source = [line.get("validation_by_source", {}) for line in (own, other)]
        assert by_source[0] == pytest.approx(by_source[1], rel=1e-5)
    assert sum("validation_by_source" in line for line in cut.metrics) == 2
    assert sum("validation_loss" in line for line in cut.metrics) == 2
