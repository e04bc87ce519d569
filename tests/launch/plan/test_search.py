"""Layouts of all axes, searched."""

import json

import pytest

from launch.cli import run
from tests.launch.plan.presets import CONFIGS, preset


def test_a_search_over_all_axes_finds_what_zero_alone_cannot_fit(capsys):
    arguments = ["plan", str(CONFIGS / "turbos_560b.yaml"), "--gpus", "2048", "--search", "--json"]
    assert run(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] and found["layouts"]
    seconds = [item["step"]["seconds"] for item in found["layouts"]]
    assert seconds == sorted(seconds)
    best = found["layouts"][0]["parallel"]
    overrides = [f"parallel.{name}={str(value).lower()}" for name, value in best.items()]
    overrides.append(f"train.micro_batch_size={found['layouts'][0]['train']['micro_batch_size']}")
    config = preset("turbos_560b", *overrides, ranks=2048)  # obeys every rule of a run
    assert config.parallel.tensor == best["tensor"]
    assert [stage["name"] for stage in found["stages"]] == ["pretraining", "annealing", "context_32k", "context_256k"]
    assert found["run"]["days"] == pytest.approx(sum(stage["days"] for stage in found["stages"]))
    assert all("of 79.1" in item["reason"] for item in found["near_misses"])
