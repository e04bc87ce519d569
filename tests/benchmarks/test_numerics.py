"""Recipes are compared on the same weights and data, and a gap above the limit is the exit code."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest
import yaml

from benchmarks.command import run
from benchmarks.numerics.__main__ import numerics
from benchmarks.numerics.compare import find_excess, last_loss
from tests.pretrain.tiny_run import tiny_config, tiny_data

STEPS, SEEDS = 2, 2


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = tmp_path_factory.mktemp("numerics")
    config = tiny_config(tiny_data(folder / "data"), folder / "run", train__steps=40, train__global_batch_size=2)
    path, out = folder / "run.yaml", folder / "out.json"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    words = [str(path), "--recipes", "fp8_block,nvfp4", "--json", "--limit", "-1"]
    with out.open("w") as file, pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdout", file)
        code = run(numerics, [*words, "--steps", str(STEPS), "--seeds", str(SEEDS)])
    assert code == 3, "every gap is above -100%"
    assert not (folder / "run").exists(), "the configuration's own run is not touched"
    return json.loads(out.read_text())


def test_each_recipe_trains_the_same_weights_on_the_same_data(result):
    wide = result["recipes"]["none"]["losses"]
    assert [len(losses) for losses in wide] == [STEPS] * SEEDS
    assert wide[0] != wide[1], "seeds differ"
    for name in ("fp8_block", "nvfp4"):
        found = result["recipes"][name]
        assert found["emulated"], "a CPU has no such products"
        for own, other in zip(found["losses"], wide, strict=True):
            # First losses differ only by the forward products, of weights that are equal.
            assert own[0] != other[0] and own[0] == pytest.approx(other[0], rel=5e-3)
        gaps = [last_loss(own) / last_loss(other) - 1 for own, other in zip(found["losses"], wide, strict=True)]
        assert found["gap"] == pytest.approx(statistics.mean(gaps)) and found["spread"] == pytest.approx(
            statistics.stdev(gaps)
        )


def test_gradients_by_coarser_numbers_have_larger_errors(result):
    fp8, nvfp4 = (result["recipes"][name]["gradient_error"] for name in ("fp8_block", "nvfp4"))
    assert fp8.keys() == nvfp4.keys() == {"M", "E", "*", "-"}, "also of blocks that read other gradients"
    assert all(0 < fp8[kind] < nvfp4[kind] for kind in fp8)
    # 4% of a product of e4m3, 17% of e2m1, and what blocks after add.
    assert fp8["-"] < 0.15 and nvfp4["-"] < 0.6
    assert result["recipes"]["nvfp4"]["zeroed"]["M in_proj gradient"] > 0


def test_a_limit_names_the_recipes_above_it(result):
    gaps = {name: found["gap"] for name, found in result["recipes"].items() if name != "none"}
    assert find_excess(result, max(gaps.values())) == []
    assert len(find_excess(result, min(gaps.values()) - 1e-9)) == 2


def test_an_unknown_recipe_is_named(capsys, tmp_path: Path):
    path = tmp_path / "run.yaml"
    path.write_text("{}")
    assert run(numerics, [str(path), "--recipes", "fp16"]) == 2
    assert "there is no recipe 'fp16'; use some of fp8_block,mxfp8,nvfp4" in capsys.readouterr().err
