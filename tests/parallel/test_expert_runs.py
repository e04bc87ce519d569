"""Runs with spread experts: bf16, and a bad gradient of experts that one rank alone holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.config import DataConfig
from pretrain.run import close_run, start_run
from pretrain.signals import SignalWatch
from pretrain.step import train_step
from tests.helpers.spawn import run_ranks
from tests.parallel.layouts import Layout, Outcome, gather_weights, layout_config, run_layout
from tests.pretrain.tiny_run import tiny_data

BF16 = {"train__precision": "bf16"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    return tiny_data(tmp_path_factory.mktemp("data"))


def run_bf16(parallels: list[dict[str, Any]], data: DataConfig, folder: str) -> list[Outcome]:
    return [
        run_layout(layout_config(Layout(2, parallel, settings=BF16), data, Path(folder, str(number))))
        for number, parallel in enumerate(parallels)
    ]


@pytest.mark.slow
def test_bf16_losses_and_norms_are_those_of_one_rank(data: DataConfig, tmp_path: Path) -> None:
    experts = [{"expert": 2, "zero_stage": stage} for stage in (1, 2)]
    outcomes = run_ranks(run_bf16, experts, data, str(tmp_path / "two"), num_ranks=2)[0]
    (expected,) = run_ranks(run_bf16, [{}], data, str(tmp_path / "one"), num_ranks=1)[0]
    for outcome in outcomes:
        # An expert's output is rounded to bf16 (2^-9) before it is weighted, where one rank weighs first.
        assert outcome.losses == pytest.approx(expected.losses, rel=2e-3)
        assert outcome.grad_norms == pytest.approx(expected.grad_norms, rel=2e-2)


def poison_experts(data: DataConfig, folder: str, stage: int, precision: str) -> tuple[list[bool], Any]:
    settings = {"train__precision": precision}
    config = layout_config(Layout(2, {"expert": 2, "zero_stage": stage}, settings=settings), data, Path(folder))
    with SignalWatch() as signals:
        run = start_run(config, signals)
        is_last = run.parallel.rank == run.parallel.world_size - 1
        before = gather_weights(run)
        victim = dict(run.model.named_parameters())["blocks.1.mixer.experts.down"]
        handle = victim.register_hook(lambda gradient: gradient * float("nan") if is_last else gradient)
        poisoned = train_step(run)
        handle.remove()
        unmoved = all(torch.equal(tensor, before[name]) for name, tensor in gather_weights(run).items())
        following = train_step(run)
        close_run(run)
    assert poisoned.skip is not None, "the step was not skipped"
    return [poisoned.applied, unmoved, following.applied], poisoned.skip


def poison_all(data: DataConfig, folder: str) -> list[Any]:
    cases = [(1, "float32"), (1, "bf16"), (2, "bf16")]
    return [poison_experts(data, f"{folder}/{stage}{precision}", stage, precision) for stage, precision in cases]


def test_a_bad_gradient_of_experts_on_one_rank_skips_the_step_on_all(data: DataConfig, tmp_path: Path) -> None:
    for results in run_ranks(poison_all, data, str(tmp_path), num_ranks=2):
        for flags, skip in results:
            assert flags == [False, True, True], "the poisoned step moved nothing, the next one did"
            faults = [{"rank": 1, "parameter": "blocks.1.mixer.experts.down", "num_parameters": 1}]
            assert skip["faults"] == faults
