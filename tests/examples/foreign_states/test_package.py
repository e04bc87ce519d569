"""The package as pip would install it."""

from __future__ import annotations

import tomllib
from pathlib import Path

from amfm.launch.existing import load_packaged

ROOT = Path(__file__).parents[3]


def test_the_installed_entry_points_are_those_of_the_project_and_load() -> None:
    project = tomllib.loads((ROOT / "examples/foreign_states/pyproject.toml").read_text())["project"]
    entries = project["entry-points"]["amfm.verbs"]
    installed = ROOT / "tests/helpers/installed/amfm_foreign_states-1.0.dist-info/entry_points.txt"
    assert installed.read_text() == "[amfm.verbs]\n" + "".join(f"{name} = {at}\n" for name, at in entries.items())
    assert all(callable(load_packaged(name, "foreign_states")) for name in entries)
