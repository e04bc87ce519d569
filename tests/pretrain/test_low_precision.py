"""Runs by recipes of low precision, emulated: they learn, resume and recompute bitwise, and may change their recipe."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from amfm.data_pipeline.config import DataConfig
from amfm.kernels.low_precision import emulated
from amfm.pretrain.config.schema import RunConfig
from amfm.pretrain.report.data import read_run
from amfm.pretrain.report.plots import make_plots
from tests.pretrain.tiny_run import Trained, read_events, tiny_config, tiny_data, train_and_collect

# Random rounding, Hadamard matrices, mxfp8 in output projections, hidden rows as codes of e4m3: every format is in it.
NVFP4 = {
    "low_precision__recipe": "nvfp4",
    "low_precision__emulate": True,
    "low_precision__measure_every_steps": 2,
    "low_precision__activation_storage": "fp8",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    return tiny_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def whole(data: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Trained]:
    folder = tmp_path_factory.mktemp("whole") / "run"
    return folder, train_and_collect(nvfp4(data, folder))


@pytest.fixture(scope="module")
def half(data: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that stopped after two steps, of which tests take copies."""
    folder = tmp_path_factory.mktemp("half") / "run"
    train_and_collect(nvfp4(data, folder, train__stop_after_steps=2))
    return folder


def nvfp4(data: DataConfig, folder: Path, **changes: Any) -> RunConfig:
    return tiny_config(data, folder, **NVFP4, train__checkpoint_every_steps=2, **changes)


def assert_same_bits(actual: Trained, expected: Trained) -> None:
    assert actual.series("loss") == expected.series("loss")
    for name, weight in expected.weights.items():
        assert torch.equal(actual.weights[name], weight), name


def test_a_recipe_changes_the_numbers_a_little_and_is_in_the_record(
    whole: tuple[Path, Trained], data: DataConfig, tmp_path: Path
) -> None:
    folder, narrow = whole
    wide = train_and_collect(tiny_config(data, tmp_path / "run"))
    assert narrow.series("loss") != wide.series("loss")
    # A tenth of a nat a token would be a broken product; e2m1 moves these losses by thousandths.
    assert narrow.series("loss") == pytest.approx(wide.series("loss"), abs=0.1)
    rows = json.loads((folder / "environment.json").read_text())["model"]["products"]
    assert {row["precision"] for row in rows if row["weight"] == "out_proj.weight"} == {"mxfp8"}
    assert "products" not in json.loads((tmp_path / "run" / "environment.json").read_text())["model"]
    assert "bf16_last_layers=0.15" in read_events(folder, "low_precision")[0]["text"]


def test_what_quantising_loses_is_measured_by_kind_of_block_when_it_is_due(whole: tuple[Path, Trained]) -> None:
    measured = [line.get("low_precision") for line in whole[1].metrics]
    assert [found is not None for found in measured] == [False, True, False, True]
    error = measured[1]["error"]
    assert {name.split()[0] for name in error} == {"M", "E", "-"}
    assert {name.split()[-1] for name in error} == {"input", "gradient", "weight"}
    # e4m3 keeps 3 bits behind the leading one, e2m1 one: 2.7% and near 10% of normal numbers.
    assert error["M out_proj input"] < 0.05 < error["M in_proj weight"] < 0.2
    assert 0 < measured[1]["zeroed"]["M in_proj gradient"] < 0.5
    (plot,) = [plot for plot in make_plots(read_run(whole[0])) if plot.name == "quantization"]
    assert plot.heat is not None and plot.heat.edges == (1.5, 3.0, 4.5), "two measurements, after steps 2 and 4"
    place = plot.heat.names.index("M in_proj gradient")
    assert plot.heat.rows[place][0] == pytest.approx(100 * measured[1]["zeroed"]["M in_proj gradient"])


def test_a_resumed_run_rounds_as_one_that_was_not_interrupted(
    whole: tuple[Path, Trained], half: Path, data: DataConfig, tmp_path: Path
) -> None:
    shutil.copytree(half, tmp_path / "run")
    assert_same_bits(train_and_collect(nvfp4(data, tmp_path / "run")), whole[1])


@pytest.mark.slow  # the next one computes them again too
def test_blocks_that_are_computed_again_round_as_before(
    whole: tuple[Path, Trained], data: DataConfig, tmp_path: Path
) -> None:
    assert_same_bits(train_and_collect(nvfp4(data, tmp_path / "run", train__recompute="full")), whole[1])


def test_weights_quantised_once_a_step_give_the_same_bits_from_fewer_passes(
    whole: tuple[Path, Trained], data: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    made: list[str] = []
    made_once = emulated.made_once

    def note(weight: torch.Tensor, what: str, make: Callable[[], Any]) -> Any:
        asked.append(what)
        return made_once(weight, what, lambda: (made.append(what), make())[1])

    monkeypatch.setattr(emulated, "made_once", note)
    changes = {"low_precision__quantize_weights": "each_step", "train__recompute": "full"}
    assert_same_bits(train_and_collect(nvfp4(data, tmp_path / "run", **changes)), whole[1])
    assert len(made) <= len(asked) * 2 / 3, "forward, and forward again, ask for the same codes"


def test_a_run_may_end_in_another_precision_and_says_so(half: Path, data: DataConfig, tmp_path: Path) -> None:
    shutil.copytree(half, tmp_path / "run")
    wide = train_and_collect(tiny_config(data, tmp_path / "run"))
    assert len(wide.metrics) == 4
    changes = [event["text"] for event in read_events(tmp_path / "run", "resume")]
    assert any("low_precision.recipe: 'nvfp4' -> 'none'" in text for text in changes)
