"""Packages whose verbs the tests have as pip would install them."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from amfm.launch.existing import load_packaged

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "package",
    [
        "foreign_states",
        "clients",
        "simulate",
        "convert",
        "tasks",
        "compact",
        "prometheus",
        "replay",
        "serve",
        "profile",
    ],
)
def test_the_installed_entry_points_are_those_of_the_project_and_load(package: str) -> None:
    project = tomllib.loads((ROOT / "examples" / package / "pyproject.toml").read_text())["project"]
    entries = project["entry-points"]["amfm.verbs"]
    installed = ROOT / f"tests/helpers/installed/amfm_{package}-1.0.dist-info/entry_points.txt"
    assert installed.read_text() == "[amfm.verbs]\n" + "".join(f"{name} = {at}\n" for name, at in entries.items())
    assert all(callable(load_packaged(name, package)) for name in entries)
