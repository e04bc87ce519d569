"""Extras: what they hold, and the one message where a command needs one that is not installed."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import amfm
from amfm.launch.cli import run
from amfm.pretrain.extras import EXTRAS, absent_extras_in_words, require_extra

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MODULES = {"protobuf": "google.protobuf", "lm-eval": "lm_eval"}


def test_the_table_is_that_of_the_package() -> None:
    declared = {name: [Requirement(text).name for text in PROJECT["optional-dependencies"][name]] for name in EXTRAS}
    assert {name: tuple(MODULES.get(item, item) for item in items) for name, items in declared.items()} == EXTRAS
    assert PROJECT["optional-dependencies"]["all"] == [f"amfm-pretrain[{','.join(EXTRAS)}]"]


def test_the_core_has_19_dependencies_and_none_of_an_extra() -> None:
    core = {Requirement(text).name for text in PROJECT["dependencies"]}
    assert len(core) == 19 and "(19 packages)" in (ROOT / "docs/getting_started.md").read_text()
    assert core.isdisjoint(Requirement(text).name for name in EXTRAS for text in PROJECT["optional-dependencies"][name])


def test_the_newest_release_of_the_changelog_is_the_version_and_dated() -> None:
    version, _ = re.findall(
        r"^## (\d+\.\d+\.\d+) - (\d{4}-\d{2}-\d{2})$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE
    )[0]
    assert version == amfm.__version__


@pytest.fixture
def without_pyarrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)  # what Python itself has for a module that cannot be imported
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "pyarrow" else object())


@pytest.mark.usefixtures("without_pyarrow")
def test_a_verb_names_the_extra_that_it_needs_before_any_work(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["prepare", "--preset", "tiny_cpu"]) == 2
    message = "amfm prepare needs pyarrow, which is not installed; run pip install '.[data]' in the clone of amfm"
    assert message in capsys.readouterr().err
    with pytest.raises(ValueError, match=re.escape(message)):
        require_extra("data", "amfm prepare")


def test_an_import_that_no_verb_foresaw_names_the_extra_and_others_pass() -> None:
    with pytest.raises(ValueError, match=r"needs obstore, which is not installed; run pip install '\.\[data\]'"):
        with absent_extras_in_words():
            raise ModuleNotFoundError("No module named 'obstore'", name="obstore")
    with pytest.raises(ModuleNotFoundError), absent_extras_in_words():
        raise ModuleNotFoundError("No module named 'nothing'", name="nothing")
