"""Stages of a conversion on two ranks, however they share the work, are those of one rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from amfm_convert.stages import conversion_stages
from amfm_convert.weights import complete_stage, stage_weights, write_start

from amfm.data_pipeline.config import DataConfig
from amfm.pretrain.config.schema import RunConfig
from amfm.pretrain.train import train
from tests.examples.convert.conversions import conversion, train_teacher
from tests.helpers.spawn import run_ranks
from tests.pretrain.tiny_run import read_metrics

# float32: the same sums in another order, over a few steps of Adam, whose first ones divide by small numbers.
NEAR = {"rtol": 2e-4, "atol": 2e-5}
LAYOUTS: dict[str, dict[str, Any]] = {
    "tensor": {"tensor": 2},
    "tokens too": {"tensor": 2, "sequence_parallel": True},
    "context": {"context": 2},
    "pipeline": {"pipeline": 2},
    "ZeRO 2": {"zero_stage": 2},
    "ZeRO 0": {"zero_stage": 0},
}


def run_stages(configs: list[RunConfig]) -> None:
    for config in configs:
        assert train(config) == 0


@pytest.mark.slow  # quick tests run each stage on one rank, and mixers on two
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_ranks_transfer_and_tune_as_one_does(data: DataConfig, tmp_path: Path, layout: str) -> None:
    teacher = train_teacher(data, tmp_path)
    found = []
    for ranks, parallel in ((1, {}), (2, LAYOUTS[layout])):
        # Cut by hand: the stage with the head gets one block by cost, and that one is not converted.
        pattern = "*-|*-" if parallel.get("pipeline") else "*-*-"
        changes = {"convert__keep_blocks": [], "model__pattern": pattern, "parallel": parallel}
        config = conversion(data, tmp_path / str(ranks), teacher, **changes)
        write_start(config)
        transfer, tune, *_ = conversion_stages(config)
        for stage in (transfer, tune):
            run_ranks(run_stages, [stage.config], num_ranks=ranks)
            complete_stage(stage)
        found.append((transfer, tune))
    (one_transfer, one_tune), (two_transfer, two_tune) = found
    for one, two in ((one_transfer, two_transfer), (one_tune, two_tune)):
        for before, after in zip(read_metrics(one.run_dir), read_metrics(two.run_dir), strict=True):
            for key in ("loss", "grad_norm"):
                assert after[key] == pytest.approx(before[key], rel=1e-4), (one.name, key)
            assert after["auxiliary"] == pytest.approx(before["auxiliary"], rel=1e-4)
        expected, actual = stage_weights(one).state, stage_weights(two).state
        assert expected.keys() == actual.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(actual[name], tensor, **NEAR, msg=lambda text, name=name: f"{name}: {text}")
