"""`python -m benchmarks.layouts`: rows of presets have the numbers of their headers, rows of a search those of the plan."""

from dataclasses import replace
from pathlib import Path

import pytest

from amfm.launch.plan.estimate import Assumptions, estimate
from amfm.launch.plan.hardware import HARDWARE
from amfm.launch.plan.layout import Layout
from amfm.pretrain.checks.load import load_checked
from amfm.pretrain.config.train_and_launch import TrainConfig
from benchmarks.command import run
from benchmarks.layouts import (
    HEADER,
    OWN,
    SEARCHED,
    is_near,
    joined,
    layouts,
    read_table,
    row_of,
    searched_row,
    write_table,
)

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/layouts.md"


def test_rows_of_presets_have_the_numbers_of_their_headers() -> None:
    rows = read_table(PAGE)
    own = {row[0]: row for row in rows if row[4] == OWN}
    searched = {(row[0], row[3]) for row in rows if row[4] != OWN}
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        words = " ".join(line.lstrip("# ") for line in path.read_text().splitlines() if line[:1] == "#")
        if (planned := HEADER.search(words)) and (path.stem, planned[1]) not in searched:
            row = own.pop(path.stem)
            assert (row[3], *row[6:]) == planned.groups(), f"{path.stem}: write docs/layouts.md again"
    assert not own and len(searched) >= 6


@pytest.mark.parametrize("name, gpus", [("ladder_20m", "8"), ("ladder_1b_a300m", "8")])
def test_a_row_of_a_search_is_what_the_plan_predicts_for_its_layout(name: str, gpus: str) -> None:
    (row,) = (row for row in read_table(PAGE) if (row[0], row[3], row[4]) == (name, gpus, SEARCHED))
    words = [
        f"{'train' if word.partition('=')[0] in TrainConfig.model_fields else 'parallel'}.{word}"
        for word in row[5].strip("`").split()
    ]
    config = load_checked(ROOT / f"configs/{name}.yaml", words)
    found = estimate(config, Layout.of(config, int(gpus)), HARDWARE["h100"], Assumptions())
    assert searched_row(name, config, found) == row, "python -m benchmarks.layouts --search writes the row again"


def test_a_search_writes_its_row_and_keeps_the_others(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Page\n\n<!-- table -->\n<!-- end of the table -->\n")
    kept = row_of("tiny_cpu", load_checked(ROOT / "configs/tiny_cpu.yaml", []), "2", SEARCHED, "9.9", "9.9%")
    write_table(page, [kept])
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/tiny.yaml").write_text((ROOT / "configs/tiny_cpu.yaml").read_text())
    arguments = [str(tmp_path / "configs"), "--search", "tiny", "--gpus", "1", "--write", str(page)]
    assert run(layouts, arguments) == 0
    rows = read_table(page)
    assert kept in rows and [row[3:5] for row in rows if row[0] == "tiny"] == [("1", SEARCHED)]
    assert joined([(*kept[:4], OWN, *kept[5:])], [kept]) == [kept]
    faster = (*kept[:4], OWN, *kept[5:-1], "10.0%")
    assert joined([faster], [kept]) == [faster]


def test_near_a_layout_is_each_axis_halved_or_doubled_at_most() -> None:
    own = Layout(64, 1, 1, expert=8, pipeline=4)
    for changed in (
        {"expert": 4},
        {"expert": 16, "pipeline": 2, "context": 2},
        {"tensor": 2, "micro_batch_size": 8},
    ):
        assert is_near(replace(own, **changed), own), changed
    for changed in ({"expert": 2}, {"pipeline": 16}, {"tensor": 4}, {"context": 4, "expert": 8}):
        assert not is_near(replace(own, **changed), own), changed


def test_a_page_without_a_place_for_the_table_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text("# Page\n")
    with pytest.raises(ValueError, match="use docs/layouts"):
        write_table(tmp_path / "page.md", [])
