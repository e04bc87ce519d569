"""Installed packages: what extras bring, what is said where one is absent, and ranks that were not started with the same versions."""

from __future__ import annotations

import re
import shutil
import socket
import sys
import tomllib
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

import amfm
from amfm.data_pipeline.config import DataConfig
from amfm.launch.cli import run
from amfm.pretrain.packages import (
    EXTRAS,
    OWN_PACKAGES,
    ROOT,
    absent_extras_in_words,
    collect_versions,
    digest_code,
    read_version,
    require_extra,
)
from amfm.pretrain.start import describe_difference
from tests.faults.attempt import Attempt
from tests.helpers.spawn import run_ranks
from tests.pretrain.tiny_run import tiny_data

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


def differ(attempt: Attempt, changes: dict[str, Any], rank: int) -> None:
    """Only in the process of rank 1."""
    if rank == 1:
        attempt.data = changes.pop("data", attempt.data)
        attempt.settings = attempt.settings | changes


def start_differing(
    data: DataConfig, place: str, cases: list[dict[str, Any]]
) -> list[tuple[list[int], list[str], bool]]:
    found = []
    for number, changes in enumerate(cases):
        run_dir = Path(place, str(number))
        run_dir.mkdir()
        attempt = Attempt(data, run_dir, {"train__steps": 2}, num_ranks=2)
        attempt.prepare = partial(differ, attempt, changes)
        attempt.start()
        codes = attempt.finish()
        attempt.prepare = None  # it holds the attempt, whose store must not be left to a collector in the next fork
        said = [(run_dir / f"error-{rank}.txt").read_text() for rank in range(2) if codes[rank]]
        found.append((codes, said, (run_dir / "metrics.jsonl").exists()))
    return found


def test_other_settings_or_another_store_on_one_rank_are_refused_by_all(tmp_path: Path) -> None:
    data = tiny_data(tmp_path / "data")
    other = tiny_data(tmp_path / "other").model_copy(update={"store": data.store})
    replaced = data.model_copy(update={"store": str(tmp_path / "moved")})
    shutil.copytree(other.store, tmp_path / "moved")
    cases = [{"train__seed": 5}, {"optimizer__learning_rate": 1.0, "train__steps": 3}, {"data": replaced}]
    host = socket.gethostname()
    results = run_ranks(start_differing, data, str(tmp_path), cases, num_ranks=1)[0]
    for (codes, said, trained), words in zip(
        results, ["train.seed=5, the others 0", "train.steps=3, the others 2", f'data.store="{tmp_path}/moved"']
    ):
        assert codes == [2, 2] and not trained, (codes, said)
        assert all(text.startswith(f"ranks were not started alike: rank 1 on {host} has {words}") for text in said), (
            said
        )


def test_the_ranks_that_differ_from_most_are_named() -> None:
    usual, odd = {"torch": "2.9", "train.seed": "0"}, {"torch": "2.9", "train.seed": "1"}
    text = describe_difference([("a", odd), ("a", usual), ("b", usual), ("b", {"torch": "2.9"})])
    assert "rank 0 on a, rank 3 on b has train.seed=1, the others 0" in text
    versions = [("a", usual), ("a", usual), *[("c", {**usual, "torch": "2.10"})] * 7]
    assert "rank 0 on a, rank 1 on a has torch=2.9, the others 2.10" in describe_difference(versions)
    with pytest.raises(AssertionError):
        describe_difference([("a", usual), ("b", usual)])


def test_one_changed_byte_of_our_code_is_another_version(tmp_path: Path) -> None:
    for package in OWN_PACKAGES:
        (tmp_path / package).mkdir()
        (tmp_path / package / "file.py").write_text("x = 1")
    before = digest_code(tmp_path)
    digest_code.cache_clear()
    assert digest_code(tmp_path) == before
    (tmp_path / "model" / "file.py").write_text("x = 2")
    digest_code.cache_clear()
    assert digest_code(tmp_path) != before
    assert collect_versions()["amfm's source files"] == digest_code(ROOT)
    misses = read_version.cache_info().misses
    assert collect_versions() == collect_versions() and read_version.cache_info().misses == misses, (
        "read once a process"
    )
