"""Table, JSON and plots of a study say what the runs' own metrics say."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean, median

import pytest
from amfm_study.grid import Cell, expand_grid
from amfm_study.study import load_study
from amfm_study.table import make_rows, read_result, study_markdown
from small_study import finish, write_small_study

from amfm.launch.cli import run
from amfm.model.flops import count_parameters
from amfm.model.state_size import state_bytes
from amfm.pretrain.config.file import load_config


@pytest.fixture
def study_path(tmp_path: Path) -> Path:
    return write_small_study(tmp_path)


# Four of the ten cells.
SOME = "ratios=[none]"


def metrics(cell: Cell) -> list[dict[str, float]]:
    return [json.loads(text) for text in Path(cell.config.run.dir, "metrics.jsonl").read_text().splitlines()]


def test_the_numbers_of_table_and_json_are_those_of_the_runs(study_path, capsys):
    cells = expand_grid(load_study(study_path))
    for number, cell in enumerate(cells):
        finish(cell, number)
    assert run(["study", "mixers", str(study_path), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    folder = study_path.parent / "study"
    written = json.loads((folder / "study.json").read_text())
    assert shown == written | {"failed": {}}
    assert (written["planned"], written["finished"]) == (10, 10)
    for row in written["table"]:
        own = [cell for cell in cells if (cell.mixer, cell.ratio) == (row["mixer"], row["ratio"])]
        assert [cell.seed for cell in own] == [0, 1]
        values = [metrics(cell)[-1]["validation_loss"] for cell in own]
        speeds = [median(item["tokens_per_second"] for item in metrics(cell)[2:]) for cell in own]
        assert row["tasks"]["text"] == {
            "mean": mean(values),
            "low": min(values),
            "high": max(values),
            "tokens_per_second": mean(speeds),
            "seeds": 2,
        }
        model = own[0].config.model
        assert row["parameters"] == count_parameters(model).total
        assert row["state_bytes"] == state_bytes(model, 4096)
    order = [(row["mixer"], row["ratio"]) for row in written["table"]]
    assert order == [("Mamba2", "none"), ("Mamba2", "1:1"), ("attention", "all"), ("wide", "none"), ("wide", "1:1")]
    picture = (folder / "study.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    table = (folder / "study.md").read_text().splitlines()
    assert table[2].startswith("| Mamba2 | no attention | ") and table[2].endswith("| 3.357 (3.000 to 3.714) | 102 |")


def test_a_synthetic_task_is_judged_by_its_accuracy(study_path):
    folder = study_path.parent
    text = load_config(folder / "text.yaml").model_dump(mode="json")
    text["data"] = {"synthetic": {"task": "mqar", "num_pairs": 4}, "num_workers": 0}
    (folder / "recall.yaml").write_text(json.dumps(text))
    cells = expand_grid(load_study(study_path, ["tasks=[{name: recall, config: recall.yaml}]", SOME]))
    finish(cells[0], 0)
    path = Path(cells[0].config.run.dir, "metrics.jsonl")
    lines = metrics(cells[0])
    lines[1]["validation_accuracy"], lines[3]["validation_accuracy"] = 0.25, 0.75
    path.write_text("".join(json.dumps(item) + "\n" for item in lines))
    result = read_result(cells[0])
    assert result is not None and (result.value, result.task) == (0.75, "recall")
    text_table = study_markdown(cells, [result], make_rows(cells, [result], 10), state_tokens=10, slots=1)
    assert "recall: accuracy" in text_table and "| 0.750 | 100 |" in text_table


def test_an_unfinished_run_is_left_out_and_a_point_without_runs_has_no_row(study_path):
    cells = expand_grid(load_study(study_path, [SOME]))
    finish(cells[0], 0)
    finish(cells[1], 1, steps=3)
    results = [result for cell in cells if (result := read_result(cell)) is not None]
    assert [result.name for result in results] == [cells[0].name]
    rows = make_rows(cells, results, 10)
    assert [(row.mixer, row.ratio, row.tasks["text"].seeds) for row in rows] == [("Mamba2", "none", 1)]
    text = study_markdown(cells, results, rows, state_tokens=10, slots=1)
    assert "| 3.000 | 100 |" in text and "1 of 4 runs are finished" in text


def test_a_run_of_other_settings_is_refused_rather_than_compared(study_path, capsys):
    cells = expand_grid(load_study(study_path, [SOME]))
    finish(cells[0], 0)
    others = 'mixers=[{mixer: M, overrides: ["train.steps=8"]}]'
    assert run(["study", "mixers", str(study_path), SOME, others, "--dry-run"]) == 2
    message = capsys.readouterr().err
    assert (
        "Mamba2-none-text-seed0 was trained with other settings than the study now gives it (train.steps: 4 -> 8)"
        in message
    )
    assert "name another `dir` for this study, or remove that folder" in " ".join(message.split())


def test_dry_run_lists_the_cells_and_what_is_done(study_path, capsys):
    cells = expand_grid(load_study(study_path, [SOME]))
    finish(cells[0], 0)
    assert run(["study", "mixers", str(study_path), SOME, "--dry-run", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [(item["run"], item["done"]) for item in listed[:2]] == [(cells[0].name, True), (cells[1].name, False)]
    assert listed[1]["state_bytes"] == state_bytes(cells[1].config.model, 4096)


def test_more_runs_at_once_than_the_machine_holds_are_refused(study_path, capsys):
    assert run(["study", "mixers", str(study_path), "runs_at_once=10000"]) == 2
    assert "runs_at_once=10000 with threads_per_run=1 needs more than the" in capsys.readouterr().err
