"""What autograd keeps and what tensors come to are counted, and a peak is at least the state."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from benchmarks.command import run
from benchmarks.step_memory import counting_kept, most_added, step_memory


def test_kept_storages_count_once_and_weights_do_not() -> None:
    layer = nn.Linear(8, 8, bias=False)
    given = torch.ones(5, 8)
    with counting_kept(layer) as kept:
        hidden = layer(given)
        (hidden * hidden).sum().backward()  # kept twice, one storage
    assert sorted(kept.values()) == [5 * 8 * 4, 5 * 8 * 4]


def test_the_most_that_tensors_add_is_their_peak_and_not_their_sum() -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as recorded:
        for _ in range(4):
            torch.ones(250_000)
    assert 1_000_000 <= most_added(recorded) < 2_500_000


@pytest.mark.slow
def test_a_step_of_the_quickstart_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["configs/tiny_cpu.yaml", "--passes", "1", "--json"]
    assert run(step_memory, [*arguments, "--set", "train.micro_batch_size=2", "--set", "train.sequence_length=64"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["config"] == "tiny_cpu" and row["kept"] < row["state"] < row["tensors"]
    assert row["state"] < row["peak"]
