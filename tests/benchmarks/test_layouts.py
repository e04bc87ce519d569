"""`python -m benchmarks.layouts`: the page has a row for each preset with a plan, with the numbers of the preset's header."""

from pathlib import Path

import pytest

from benchmarks.layouts import HEADER, write_table

ROOT = Path(__file__).parents[2]


def test_the_page_has_the_numbers_of_every_header() -> None:
    rows = [line.split(" | ") for line in (ROOT / "docs/layouts.md").read_text().splitlines() if line.startswith("| ")]
    found = {cells[0].removeprefix("| "): (cells[3], cells[5], cells[6].removesuffix(" |")) for cells in rows[2:]}
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        words = " ".join(line.lstrip("# ") for line in path.read_text().splitlines() if line[:1] == "#")
        if planned := HEADER.search(words):
            assert found.pop(path.stem) == planned.groups(), f"{path.stem}: write docs/layouts.md again"
    assert not found


def test_a_page_without_a_place_for_the_table_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text("# Page\n")
    with pytest.raises(ValueError, match="use docs/layouts"):
        write_table(tmp_path / "page.md", [])
