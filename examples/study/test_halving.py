"""Successive halving ends the settings with the highest losses, from what run directories say, the same in every call."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from amfm_study.grid import Cell
from amfm_study.halving import halve, rung_step
from amfm_study.settings import expand_settings
from amfm_study.settings_table import settings_markdown
from amfm_study.study import HalvingConfig
from amfm_study.table import read_result
from small_study import write_small_study
from test_crossed import make_study

from amfm.pretrain.config.file import resolved_yaml
from tests.pretrain.report.test_report import line

LOSSES = {"0.001": 4.0, "0.002": 3.0, "0.004": 5.0, "8.0": None}


def go_on(cells: Sequence[Cell]) -> None:
    """Log steps until where each run stops; the loss of each rate is its own, and of the highest not finite."""
    for cell in cells:
        folder, train = Path(cell.config.run.dir), cell.config.train
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(resolved_yaml(cell.config))
        loss = LOSSES[str(cell.config.optimizer.learning_rate)]
        steps = range(1, (train.stop_after_steps or train.steps) + 1)
        lines = [line(step, tokens_per_second=9.0) | {"loss": loss} for step in steps]
        if len(steps) == train.steps:
            lines[-1]["validation_loss"] = loss
        (folder / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))


def test_half_of_the_settings_go_on_at_each_rung_and_a_second_call_trains_nothing(tmp_path: Path) -> None:
    write_small_study(tmp_path)
    rates = {"optimizer.learning_rate": tuple(float(rate) for rate in LOSSES)}
    cells = expand_settings(make_study(tmp_path, grid=rates, seeds=(0, 1)))
    trained: list[tuple[str, int | None]] = []

    def train(chosen: Sequence[Cell]) -> None:
        trained.extend((cell.mixer, cell.config.train.stop_after_steps) for cell in chosen)
        go_on(chosen)

    going, ended = halve(cells, HalvingConfig(rungs=(0.25, 0.5)), train)
    first, second = rung_step(cells[0], 0.25), rung_step(cells[0], 0.5)
    assert (first, second) == (1, 2)
    assert {cell.mixer for cell in going} == {"learning_rate_0.002"} and len(going) == 2
    assert {label: step for label, (step, _) in ended.items()} == {
        "learning_rate_0.004-text": first,
        "learning_rate_8.0-text": first,
        "learning_rate_0.001-text": second,
    }
    assert trained.count(("learning_rate_0.001", second)) == 2 and ("learning_rate_0.004", second) not in trained
    count = len(trained)
    assert halve(cells, HalvingConfig(rungs=(0.25, 0.5)), train) == (going, ended) and len(trained) == count
    go_on(going)
    results = [result for cell in going if (result := read_result(cell)) is not None]
    page = settings_markdown(cells, results, 1, ended)
    assert len(results) == 2 and "| ended at step 1 |" in page and "| ended at step 2 |" in page and "3.000" in page


def test_the_last_setting_is_never_ended(tmp_path: Path) -> None:
    write_small_study(tmp_path)
    cells = expand_settings(make_study(tmp_path, grid={"optimizer.learning_rate": (0.001,)}))
    going, ended = halve(cells, HalvingConfig(rungs=(0.25, 0.5, 0.75), keep=0.1), go_on)
    assert going == cells and ended == {}
    with pytest.raises(ValueError, match="less than 1"):
        HalvingConfig(keep=1.0)
