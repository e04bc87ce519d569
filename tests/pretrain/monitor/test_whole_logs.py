"""What a resume leaves in metrics.jsonl are the lines of a run that nothing interrupted."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from amfm.data_pipeline.config import DataConfig
from amfm.pretrain.checkpoint.manifest_file import checkpoint_name
from amfm.pretrain.train import train
from tests.pretrain.tiny_run import read_metrics, tiny_config

# Measured by a clock, or of one process: all else is computed.
MEASURED = {
    *("time", "seconds", "tokens_per_second", "tokens_per_second_per_gpu", "tflops_per_gpu", "mfu"),
    *("megatron_tflops_per_gpu",),
    *("memory_bytes", "validation_seconds"),
}


def computed(run_dir: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key not in MEASURED} for line in read_metrics(run_dir)]


def test_every_computed_number_of_a_run_that_was_lost_and_resumed_twice_is_that_of_one_that_was_not(
    data: DataConfig, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {
        "train__steps": 6,
        "train__checkpoint_every_steps": 2,
        "train__keep_last": 9,
        "train__validate_every_steps": 2,
        "train__inspect_every_steps": 2,
        "model__pattern": "E*",
    }
    assert train(tiny_config(data, tmp_path / "whole", **settings)) == 0
    for stop in (3, 5, None):
        assert train(tiny_config(data, tmp_path / "lost", **settings, train__stop_after_steps=stop)) == 0
        if stop is not None:  # what the last start saved at its end is lost with it
            shutil.rmtree(tmp_path / "lost" / "checkpoints" / checkpoint_name(stop))
    whole = computed(tmp_path / "whole")
    assert computed(tmp_path / "lost") == whole
    assert {"loss", "tokens", "data", "expert_load", "validation_loss", "inspect"} <= set().union(*whole)
    for before, line in zip([{"tokens": 0}, *read_metrics(tmp_path / "lost")], read_metrics(tmp_path / "lost")):
        assert line["tokens_per_second"] * line["seconds"] == pytest.approx(line["tokens"] - before["tokens"])
