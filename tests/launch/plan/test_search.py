"""Layouts of all axes, searched."""

import json
import time

import pytest

from launch.cli import run
from tests.launch.plan.presets import CONFIGS, preset


def test_a_search_recomputes_no_more_than_it_must_and_tries_every_schedule(capsys):
    arguments = ["plan", str(CONFIGS / "nemotron3_nano_30b.yaml"), "--gpus", "32", "--search", "--json"]
    assert run(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] is False and found["layouts"]  # ZeRO alone does not fit, other axes do
    schedules = {item["parallel"].get("schedule", "1f1b") for item in found["layouts"]}
    assert schedules == {"1f1b", "interleaved", "zero_bubble"}
    assert {item["train"]["recompute"] for item in found["layouts"]} == {"none", "selective", "full"}
    # A layout appears once: with the least recomputation that fits.
    layouts = [(str(item["parallel"]), item["train"]["micro_batch_size"]) for item in found["layouts"]]
    assert len(layouts) == len(set(layouts))


@pytest.mark.slow
def test_a_search_over_all_axes_finds_what_zero_alone_cannot_fit_within_a_minute_of_one_core(capsys):
    begun = time.process_time()
    arguments = ["plan", str(CONFIGS / "turbos_560b.yaml"), "--gpus", "4096", "--search", "--json"]
    assert run(arguments) == 0
    assert time.process_time() - begun < 60
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] and found["layouts"]
    seconds = [item["step"]["seconds"] for item in found["layouts"]]
    assert seconds == sorted(seconds)
    best = found["layouts"][0]["parallel"]
    overrides = [f"parallel.{name}={str(value).lower()}" for name, value in best.items()]
    overrides += [f"train.{name}={value}" for name, value in found["layouts"][0]["train"].items() if value]
    config = preset("turbos_560b", *overrides, ranks=4096)  # obeys every rule of a run
    assert config.parallel.tensor == best["tensor"]
    assert [stage["name"] for stage in found["stages"]] == ["pretraining", "annealing", "context_32k", "context_256k"]
    assert found["run"]["days"] == pytest.approx(sum(stage["days"] for stage in found["stages"]))
    assert all("of 79.1" in item["reason"] for item in found["near_misses"])
