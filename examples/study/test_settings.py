"""A study of settings: cells are the task's run with an entry's overrides and nothing else, and their results one table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from amfm_study.settings import expand_settings
from amfm_study.study import RunTask, SettingConfig, SettingsStudyConfig, Study
from small_study import finish, write_small_study

from amfm.launch.cli import run
from amfm.pretrain.config.errors import ConfigError
from amfm.pretrain.config.file import diff_configs

MUON = SettingConfig(label="muon", overrides=("optimizer.kind=muon", "optimizer.learning_rate=4e-3"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the run configuration of one task."""
    write_small_study(tmp_path)
    return tmp_path


def make_study(folder: Path, **changes: Any) -> Study[SettingsStudyConfig]:
    config: dict[str, Any] = {
        "dir": str(folder / "study"),
        "tasks": (RunTask(name="text", config="text.yaml"),),
        "settings": (SettingConfig(label="adamw"), MUON),
    }
    return Study(SettingsStudyConfig(**(config | changes)), folder / "study.yaml", {})


def test_cells_differ_by_their_overrides_alone(folder: Path) -> None:
    cells = expand_settings(make_study(folder, seeds=(0, 2)))
    assert [cell.name for cell in cells] == [
        *("adamw-text-seed0", "muon-text-seed0"),
        *("adamw-text-seed2", "muon-text-seed2"),
    ]
    changed = {item.key for item in diff_configs(cells[0].config, cells[1].config)}
    assert {key for key in changed if not key.startswith("run.")} == {"optimizer.kind", "optimizer.learning_rate"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"settings": (MUON, MUON)}, "settings = muon: must differ; give each its own label"),
        ({"seeds": (1, 1)}, "seeds = 1: must differ; keep one"),
        (
            {"settings": (SettingConfig(label="x", overrides=("train.seed=3",)),)},
            "settings.0.overrides = train.seed=3: is set for every run by the study's own `seeds`; use seeds",
        ),
        (
            {"settings": (SettingConfig(label="x", overrides=("optimizer.muon={rounds: 6}",)),)},
            "run x-text-seed0: override optimizer.muon={rounds: 6}: has settings of Muon, and optimizer.kind is adamw",
        ),
    ],
)
def test_entries_that_make_no_run_are_refused(folder: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        expand_settings(make_study(folder, **changes))
    assert message in str(refused.value)


def test_finished_runs_make_the_table(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / "settings.yaml"
    path.write_text(
        f"dir: {folder}/study\ntasks: [{{name: text, config: text.yaml}}]\nruns_at_once: 1\n"
        "settings:\n  - {label: adamw}\n"
        "  - {label: muon, overrides: [optimizer.kind=muon, optimizer.learning_rate=4e-3]}\n"
    )
    for number, cell in enumerate(expand_settings(make_study(folder))):
        finish(cell, number)
    assert run(["study", "settings", str(path), "--dry-run", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [(row["run"], row["overrides"], row["done"]) for row in listed] == [
        ("adamw-text-seed0", "", True),
        ("muon-text-seed0", "optimizer.kind=muon optimizer.learning_rate=4e-3", True),
    ]
    assert run(["study", "settings", str(path)]) == 0
    shown = capsys.readouterr().out
    assert shown == (folder / "study" / "study.md").read_text()
    assert "| setting | parameters | active | tokens | FLOPs | text: validation loss |" in shown
    assert " | 3.000 | " in shown and "+0.143, one seed: no verdict |" in shown
    found = json.loads((folder / "study" / "study.json").read_text())
    assert [row["label"] for row in found["table"]] == ["adamw", "muon"]
    assert found["table"][1]["summary"]["mean"] == pytest.approx(3 + 1 / 7)
