"""`python -m benchmarks.speedrun`: every way is named and learns, and results are read off right."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from amfm.pretrain.checks.load import load_checked
from amfm.pretrain.config.schema import ScheduleConfig
from amfm.pretrain.startup.data import example_batch
from benchmarks import ROOT
from benchmarks.small_steps import begin_ranks
from benchmarks.speedrun.learners import build_learner, rate_at
from benchmarks.speedrun.results import Curve, draw, summarize
from benchmarks.speedrun.ways import WAYS


def curve(name: str, points: list[tuple[float, float]]) -> Curve:
    run = {"points": points, "steps": 3, "tokens": 6, "active": 1_000_000, "precision": "float32"}
    return Curve.of(name, 1e-3, [run, run])


def test_a_schedule_follows_the_share_of_the_seconds() -> None:
    cosine = ScheduleConfig(kind="cosine", min_ratio=0.1)
    assert rate_at(0.0, cosine, 1.0) < 0.1  # warms up
    assert rate_at(0.05, cosine, 1.0) > 0.99
    assert rate_at(1.0, cosine, 1.0) == rate_at(1.5, cosine, 1.0) == pytest.approx(0.1)


def test_seconds_to_a_loss_are_read_off_between_points(tmp_path: Path) -> None:
    ours, theirs = curve("amfm", [(0, 8.0), (10, 3.0), (20, 1.0)]), curve("llama", [(0, 8.0), (10, 4.0), (20, 2.0)])
    assert ours.seconds_to(2.0) == 15 and theirs.seconds_to(1.0) is None
    assert [row[-1] for row in summarize([ours, theirs])] == ["15", "20"]
    draw([ours, theirs], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) for name in WAYS])
def test_a_way_learns_a_batch(name: str) -> None:
    way = WAYS[name]
    overrides = [*way.overrides, "train.num_threads=1", "train.sequence_length=32", "train.micro_batch_size=2"]
    config = load_checked(ROOT / "configs/tiny_cpu.yaml", [*overrides, "train.global_batch_size=2"], world_size=1)
    learner = build_learner(way, config, begin_ranks(config), 4e-3)(False)
    batch = example_batch(2, 32, 2)
    batch.tokens_BT.copy_(torch.arange(64).view(2, 32))
    batch.labels_BT.copy_(batch.tokens_BT + 1)
    before, tokens = learner.evaluate([batch])
    for _ in range(5):
        learner.step([batch], 0.1)
    assert tokens == 64 and learner.evaluate([batch])[0] < before - tokens
