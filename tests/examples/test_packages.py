"""Packages whose verbs the tests have as pip would install them."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from amfm.launch.existing import load_packaged
from tests.helpers.examples import amfm

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
        "synthetic",
    ],
)
def test_the_installed_entry_points_are_those_of_the_project_and_load(package: str) -> None:
    project = tomllib.loads((ROOT / "examples" / package / "pyproject.toml").read_text())["project"]
    groups = {group: found for group, found in project["entry-points"].items() if group != "amfm.hooks"}
    installed = ROOT / f"tests/helpers/installed/amfm_{package}-1.0.dist-info/entry_points.txt"
    sections = [[f"[{group}]", *(f"{name} = {at}" for name, at in groups[group].items())] for group in groups]
    assert installed.read_text() == "\n\n".join("\n".join(lines) for lines in sections) + "\n"
    assert all(callable(load_packaged(name, package)) for name in groups["amfm.verbs"])


@pytest.mark.parametrize(
    ("words", "package"),
    [
        (("configs/conversion/convert.yaml",), "convert"),
        (("configs/tiny_cpu.yaml", "model.pattern={window_linear}-"), "convert"),  # not a variant of window
        (("configs/tiny_cpu.yaml", "model.mixers.retnet.num_heads=2"), "mixers"),  # not a typo of deltanet
    ],
)
def test_a_mixer_whose_package_is_not_installed_comes_with_the_command(words: tuple[str, ...], package: str) -> None:
    missing = amfm("config", *words, packages=[], cwd=ROOT)
    assert missing.returncode == 2 and f"`pip install ./examples/{package}`" in " ".join(missing.stderr.split())
