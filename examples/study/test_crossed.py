"""A grid is crossed, sizes follow from it, and runs cost what the study says that they have in common."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from amfm_study.equal import flops_of_run, tokens_per_step
from amfm_study.grid import Cell
from amfm_study.settings import expand_settings, pilot_cells
from amfm_study.study import RunTask, SettingConfig, SettingsStudyConfig, Study
from small_study import finish, write_small_study

from amfm.launch.cli import run
from amfm.model.flops import count_parameters
from amfm.pretrain.config.errors import ConfigError

WIDTHS = {"model.hidden_size": (32, 64)}
DERIVED = {"model.mamba.num_heads": "hidden_size // 8", "model.feed_forward.hidden_size": "2 * model.hidden_size"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_small_study(tmp_path)
    return tmp_path


def make_study(folder: Path, **changes: Any) -> Study[SettingsStudyConfig]:
    config: dict[str, Any] = {"dir": str(folder / "study"), "tasks": (RunTask(name="text", config="text.yaml"),)}
    return Study(SettingsStudyConfig(**(config | changes)), folder / "study.yaml", {})


def total_flops(cell: Cell) -> float:
    return flops_of_run(cell.config, cell.config.train.steps * tokens_per_step(cell.config))


def test_a_grid_is_crossed_with_settings_and_derived_sizes_follow_it(folder: Path) -> None:
    rates = {"optimizer.learning_rate": (1e-3, 2e-3)}
    settings = (SettingConfig(label="adamw"), SettingConfig(label="bf16", overrides=("train.precision=bf16",)))
    cells = expand_settings(make_study(folder, settings=settings, grid=WIDTHS | rates, derived=DERIVED))
    assert len(cells) == len({cell.name for cell in cells}) == 2 * 2 * 2
    assert cells[3].name == "adamw-hidden_size_64-learning_rate_0.002-text-seed0"
    for cell in cells:
        model = cell.config.model
        assert dict(cell.values) == {
            "model.hidden_size": model.hidden_size,
            "optimizer.learning_rate": cell.config.optimizer.learning_rate,
        }
        assert model.mamba is not None and model.mamba.num_heads == model.hidden_size // 8
        assert model.feed_forward is not None and model.feed_forward.hidden_size == 2 * model.hidden_size


def test_patterns_that_differ_by_symbols_alone_are_numbered(folder: Path) -> None:
    cells = expand_settings(make_study(folder, grid={"model.pattern": ("M-", "M*", "ME")}))
    assert [cell.mixer for cell in cells] == ["pattern_M_1", "pattern_M_2", "pattern_ME_3"]


def test_runs_cost_the_flops_or_tokens_or_time_of_the_first(folder: Path) -> None:
    file = folder / "text.yaml"
    file.write_text(file.read_text().replace("steps: 4\n", "steps: 40\n"))
    study = make_study(folder, grid=WIDTHS, derived=DERIVED, equal="flops", settings=())
    narrow, wide = expand_settings(study)
    assert wide.config.train.steps < narrow.config.train.steps
    one_step = total_flops(wide) / wide.config.train.steps
    assert abs(total_flops(wide) - total_flops(narrow)) <= one_step / 2
    longer = {"train.global_batch_size": (4, 8)}
    first, second = expand_settings(make_study(folder, grid=longer, equal="tokens"))
    assert second.config.train.steps * 2 == first.config.train.steps
    timed = make_study(folder, grid=WIDTHS, derived=DERIVED, equal="time", pilot_steps=4)
    pilots = pilot_cells(timed)
    assert [cell.config.train.stop_after_steps for cell in pilots] == [4, 4] and pilots[0].config.train.steps == 40
    seconds = {"hidden_size_32-text": 0.1, "hidden_size_64-text": 0.2}
    first, second = expand_settings(timed, seconds)
    assert (first.config.train.steps, second.config.train.steps) == (40, 20)


def test_models_of_other_sizes_are_refused_or_fitted(folder: Path) -> None:
    grid = {"model.pattern": ("M-", "MM-")}
    with pytest.raises(ConfigError, match="parameters, and pattern_M-text has") as refused:
        expand_settings(make_study(folder, grid=grid, equal="parameters"))
    assert "`fit: model.feed_forward.hidden_size`" in str(refused.value)
    grid = {"model.pattern": ("MM-", "M-")}
    study = make_study(folder, grid=grid, equal="parameters", fit="model.feed_forward.hidden_size")
    sizes = [count_parameters(cell.config.model).total for cell in expand_settings(study)]
    assert abs(sizes[1] - sizes[0]) <= 0.01 * sizes[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "settings: is missing, and so is grid"),
        ({"grid": {"train.seed": (1, 2)}}, "is set for every run by the study's own `seeds`"),
        ({"grid": {"train.steps": (1, 2)}, "equal": "flops"}, "is set for every run by the study's own `equal`"),
        ({"grid": {"model.hidden_size": ()}}, "has no values; add some"),
        ({"grid": WIDTHS, "derived": {"model.mamba.num_heads": "width // 8"}}, "reads width, which is not a setting"),
        ({"grid": WIDTHS, "derived": {"model.mamba.num_heads": "open('x')"}}, "has more than a size needs"),
        ({"grid": WIDTHS, "fit": "model.hidden_size"}, "is for equal: parameters"),
        ({"grid": WIDTHS, "halving": {"rungs": (0.5, 0.25)}}, "must rise, between 0 and 1"),
        ({"grid": {"optimizer.learning_rate": (1e-3, 1e-3)}}, "must differ"),
        (
            {"grid": {"train.batch_ramp": ({"start_size": 2, "increment": 2, "steps": 2}, None)}, "equal": "flops"},
            "stages or a batch ramp",
        ),
    ],
)
def test_what_makes_no_study_is_refused(folder: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        expand_settings(make_study(folder, **changes))


def test_each_row_has_its_own_counts_and_seeds_are_compared_in_pairs(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = f"dir: {folder}/study\ntasks: [{{name: text, config: text.yaml}}]\nseeds: [0, 1, 2]\n"
    text += "grid: {model.hidden_size: [32, 64]}\nderived: {model.mamba.num_heads: hidden_size // 8}\nruns_at_once: 1\n"
    (folder / "settings.yaml").write_text(text)
    cells = expand_settings(
        make_study(folder, grid=WIDTHS, derived={"model.mamba.num_heads": "hidden_size // 8"}, seeds=(0, 1, 2))
    )
    for cell in cells:
        finish(cell, 2 * cell.seed - (7 + cell.seed % 2) * (cell.config.model.hidden_size == 64))
    assert run(["study", "settings", str(folder / "settings.yaml"), "--dry-run", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert run(["study", "settings", str(folder / "settings.yaml"), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    for row, cell in zip(shown["table"], cells[:2], strict=True):
        counts = count_parameters(cell.config.model)
        assert (row["parameters"], row["active_parameters"]) == (counts.total, counts.active)
        assert row["flops"] == flops_of_run(cell.config, row["tokens"]) and row["tokens"] > 0
    assert [line["parameters"] for line in listed[:2]] == [row["parameters"] for row in shown["table"]]
    assert listed[0]["flops"] < listed[1]["flops"] and all(line["done"] for line in listed)
    difference = shown["table"][1]["difference"]
    assert [round(value * 7) for value in difference["by_seed"].values()] == [-7, -8, -7]
    assert difference["verdict"] == "better" and difference["interval"][1] < 0
    page = (folder / "study" / "study.md").read_text()
    assert "hidden_size_64 - hidden_size_32: -1.000, -1.143, -1.000; mean -1.048 [-1.253, -0.843]: better" in page
    assert (folder / "study" / "study.png").read_bytes().startswith(b"\x89PNG")
