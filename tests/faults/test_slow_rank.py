"""A rank that computes slowly is named in the events, and the run continues."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
from torch.nn.modules.module import register_module_forward_hook

from amfm.data_pipeline.config import DataConfig
from amfm.model.block import Block
from amfm.pretrain.monitor.stragglers import STRAGGLER_STEPS
from amfm.pretrain.train import train
from tests.helpers.spawn import run_ranks
from tests.pretrain.tiny_run import read_events, tiny_config

VICTIM = 1


def train_slowly(data: DataConfig, folder: str, layout: dict[str, Any], seconds: float) -> int:
    config = tiny_config(data, Path(folder), train__steps=STRAGGLER_STEPS, train__micro_batch_size=1, **layout)

    def dawdle(module: Any, inputs: Any, output: Any) -> None:
        if isinstance(module, Block) and os.environ["RANK"] == str(VICTIM):
            time.sleep(seconds)

    handle = register_module_forward_hook(dawdle)
    code = train(config)
    handle.remove()
    return code


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "seconds"),
    [
        ({"parallel__zero_stage": 1}, 0.15),
        ({"parallel__zero_stage": 2}, 0.15),
        ({"parallel__expert": 2}, 0.15),
        ({"parallel__pipeline": 2}, 0.5),  # one block of four is on the slow rank
    ],
    ids=["reduces", "reduces each pass", "exchanges rows", "is a stage"],
)
def test_a_slow_rank_is_named_within_twenty_steps(
    data: DataConfig, tmp_path: Path, layout: dict[str, Any], seconds: float
) -> None:
    """Only this rank, though the other one waits for it in each block, each reduction or each receive."""
    assert run_ranks(train_slowly, data, str(tmp_path), layout, seconds) == [0, 0]
    (event,) = read_events(tmp_path, "stragglers")
    assert event["step"] == STRAGGLER_STEPS and [entry["rank"] for entry in event["ranks"]] == [VICTIM]
