"""A rank that computes slowly is named in the events, and the run goes on."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
from torch.nn.modules.module import register_module_forward_hook

from amfm.data_pipeline.config import DataConfig
from amfm.model.hybrid import HybridModel
from amfm.pretrain.monitor.stragglers import STRAGGLER_STEPS
from amfm.pretrain.train import train
from tests.helpers.spawn import run_ranks
from tests.pretrain.tiny_run import read_events, tiny_config

VICTIM = 1


def train_slowly(data: DataConfig, folder: str) -> int:
    config = tiny_config(data, Path(folder), train__steps=STRAGGLER_STEPS, train__micro_batch_size=1)

    def dawdle(module: Any, inputs: Any, output: Any) -> None:
        if isinstance(module, HybridModel) and os.environ["RANK"] == str(VICTIM):
            time.sleep(0.15)

    handle = register_module_forward_hook(dawdle)
    code = train(config)
    handle.remove()
    return code


@pytest.mark.slow
def test_a_slow_rank_is_named_within_twenty_steps(data: DataConfig, tmp_path: Path) -> None:
    assert run_ranks(train_slowly, data, str(tmp_path)) == [0, 0]
    (event,) = read_events(tmp_path, "stragglers")
    assert event["step"] == STRAGGLER_STEPS and [entry["rank"] for entry in event["ranks"]] == [VICTIM]
