"""What a person sees of a study: lines in a file, one line per cell on a terminal."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
from amfm_study.grid import Cell, expand_grid
from amfm_study.run import CellEnd
from amfm_study.show import StudyDisplay, last_metrics
from amfm_study.study import load_study
from amfm_study.table import read_result
from rich.console import Console
from small_study import finish, write_small_study

from tests.pretrain.report.test_report import line


@pytest.fixture
def cells(tmp_path: Path) -> list[Cell]:
    return expand_grid(load_study(write_small_study(tmp_path)))


def test_events_are_lines_where_there_is_no_terminal(cells):
    finish(cells[0], 0)
    text = io.StringIO()
    kept = read_result(cells[0])
    assert kept is not None
    display = StudyDisplay(cells, [kept], console=Console(file=text, width=300))
    for cell in cells[1:4]:
        display.begin(cell)
    finish(cells[1], 1)
    display.poll()
    display.end(cells[1], CellEnd(0), read_result(cells[1]))
    display.end(cells[2], CellEnd(3, "amfm: [disk] is full"), None)
    display.end(cells[3], CellEnd(0), None)
    display.close()
    lines = text.getvalue().splitlines()
    assert lines[0] == "study: 1 of 10 runs are done"
    assert lines[1] == f"study: {cells[1].name}: started (1 of 10 done)"
    assert [re.sub(r"after [\d hms]+,", "after a while,", text_line) for text_line in lines[4:]] == [
        f"study: {cells[1].name}: done after a while, validation loss 3.1429, 101 tokens/s",
        f"study: {cells[2].name}: failed after a while, amfm: [disk] is full",
        f"study: {cells[3].name}: stopped after a while, saved",
    ]


def test_a_terminal_shows_each_cell_on_a_line_running_and_failed_ones_on_top(cells):
    console = Console(file=io.StringIO(), width=200, force_terminal=True, color_system=None)
    display = StudyDisplay(cells, [], console=console)
    display.begin(cells[4])
    display.begin(cells[7])
    folder = Path(cells[7].config.run.dir)
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text(json.dumps(line(1)) + "\n" + json.dumps(line(2)) + '\n{"step": 3, "lo')
    display.poll()
    display.end(cells[4], CellEnd(3, "amfm: broken"), None)
    display.close()
    picture = io.StringIO()
    Console(file=picture, width=200).print(display.draw())
    rows = [text.split() for text in picture.getvalue().splitlines()]
    assert rows[2][:3] == [cells[7].name, "running", "2/4"] and rows[2][-4:] == ["loss", "4.000,", "1,000", "tokens/s"]
    assert rows[3][:3] == [cells[4].name, "failed", "0/4"] and rows[3][-1] == "broken"
    assert len(rows) == 2 + len(cells) and all(row[1] == "waiting" for row in rows[4:])


def test_the_newest_whole_line_counts_and_a_run_without_steps_has_none(tmp_path):
    assert last_metrics(tmp_path / "metrics.jsonl") is None
    (tmp_path / "metrics.jsonl").write_text('{"step": 1')
    assert last_metrics(tmp_path / "metrics.jsonl") is None
