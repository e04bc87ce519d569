"""Rows that give NaN on one rank: skipped by all, and a restart in between changes neither steps nor counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from amfm.data_pipeline.config import DataConfig
from amfm.data_pipeline.loader.loader import PretrainLoader
from amfm.model.hybrid import HybridModel
from amfm.pretrain.train import train
from tests.helpers.spawn import run_ranks
from tests.pretrain.tiny_run import read_events, read_metrics, tiny_config

VICTIM = 1
STEPS = 8
SETTINGS: dict[str, Any] = {"train__steps": STEPS, "train__micro_batch_size": 1, "train__checkpoint_every_steps": 100}


def find_rows(data: DataConfig, steps: list[int]) -> list[list[int]]:
    """Tokens of the victim's first row of each of these steps."""
    loader = PretrainLoader(
        data, split="train", sequence_length=48, micro_batch_size=1, seed=0, data_rank=VICTIM, data_world_size=2
    )
    batches = [loader.take(4) for _ in range(max(steps))]
    loader.close()
    return [batches[step - 1][0].tokens_BT.flatten().tolist() for step in steps]


def train_on(data: DataConfig, folder: str, bad_rows: list[list[int]], stops: list[int], limit: int) -> list[int]:
    """Exit codes of starts that stop after these steps, of a model whose first output is NaN for the bad rows."""
    meets_bad_row = False

    def look(module: Any, inputs: Any) -> None:
        nonlocal meets_bad_row
        if isinstance(module, HybridModel):
            meets_bad_row = inputs[0].flatten().tolist() in bad_rows

    def poison(module: Any, inputs: Any, output: Any) -> Any:
        nonlocal meets_bad_row
        if meets_bad_row and isinstance(output, torch.Tensor) and output.is_floating_point():
            meets_bad_row = False
            return output * float("nan")
        return None

    handles = [register_module_forward_pre_hook(look), register_module_forward_hook(poison)]
    settings = {**SETTINGS, "train__max_skipped_steps": limit}
    codes = [train(tiny_config(data, Path(folder), **settings, train__stop_after_steps=stop)) for stop in stops]
    for handle in handles:
        handle.remove()
    return codes


@pytest.mark.slow
def test_steps_skipped_for_nan_stay_skipped_and_counted_across_resumes(data: DataConfig, tmp_path: Path) -> None:
    """NaN at steps 3, 5 and 6; started once, and again before, between and after them."""
    rows = find_rows(data, [3, 5, 6])
    lines = []
    for name, stops in (("straight", [STEPS]), ("resumed", [2, 3, 5, 7, STEPS])):
        folder = tmp_path / name
        assert run_ranks(train_on, data, str(folder), rows, stops, 3) == [[0] * len(stops)] * 2
        assert [event["step"] for event in read_events(folder, "skipped_step")] == [3, 5, 6]
        assert [event["in_row"] for event in read_events(folder, "skipped_step")] == [1, 1, 2]
        faults = [fault["rank"] for event in read_events(folder, "skipped_step") for fault in event["faults"]]
        assert faults == [VICTIM] * 3
        lines.append(
            [(line["step"], line["loss"], line["grad_norm"], line["skipped"]) for line in read_metrics(folder)]
        )
    assert lines[0] == lines[1] and [line[3] for line in lines[0]].count(True) == 3


def test_a_restart_does_not_reset_the_count_of_skips_in_a_row(data: DataConfig, tmp_path: Path) -> None:
    codes = run_ranks(train_on, data, str(tmp_path), find_rows(data, [3, 4, 5]), [4, STEPS], 3)
    assert codes == [[0, 3]] * 2
    assert "3 steps in a row were skipped (train.max_skipped_steps=3)" in read_events(tmp_path, "gave_up")[0]["cause"]
