"""A clock that is set back, locales, Python's options, a limit of files' sizes: the same losses, or code 3 in words and then the same."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

import pytest

from amfm.data_pipeline.config import DataConfig
from amfm.pretrain.checkpoint.manifest_file import list_checkpoints, read_manifest
from amfm.pretrain.launcher_protocol import DONE, RUN_FAILED
from amfm.pretrain.monitor.follow import FollowedRun
from amfm.pretrain.report.data import read_run
from amfm.pretrain.report.goodput import measure_goodput
from amfm.pretrain.report.report import write_report
from tests.faults.disk import ROOT, build_library
from tests.pretrain.conftest import data
from tests.pretrain.tiny_run import read_events, read_metrics

__all__ = ["data"]


def start(
    place: Path,
    name: str,
    what: str,
    variables: Mapping[str, str] | None = None,
    options: tuple[str, ...] = ("-W", "ignore"),
) -> tuple[int, str]:
    """Code and words of one start in a fresh interpreter with options of Python."""
    words = [str(place / "data.json"), str(place / name), what]
    done = subprocess.run(
        [sys.executable, *options, "-m", "tests.faults.circumstances.child", *words],
        env={**os.environ, "PYTHONPATH": str(ROOT), **(variables or {})}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def place(data: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a run that nothing disturbed."""
    place = tmp_path_factory.mktemp("surroundings")
    (place / "data.json").write_text(data.model_dump_json())
    assert start(place, "straight", "nothing")[0] == DONE
    return place


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(folder)]


@pytest.mark.slow
def test_a_clock_that_is_set_back_and_on_changes_nothing(place: Path) -> None:
    variables = {"LD_PRELOAD": str(build_library()), "AMFM_CLOCK": str(place / "ahead")}
    code, said = start(place, "clock", "clock", variables)
    assert code == DONE, said
    assert losses(place / "clock") == losses(place / "straight")
    assert all(line["seconds"] > 0 and line["tokens_per_second"] > 0 for line in read_metrics(place / "clock"))
    times = [line["time"] for line in read_events(place / "clock")]
    assert times == sorted(times)
    saved = read_manifest(list_checkpoints(place / "clock" / "checkpoints")[0])["saved_at"]
    ahead = datetime.fromisoformat(saved) - datetime.fromisoformat(times[-1])
    assert ahead.total_seconds() > 80_000, "the clock was not set"
    record = read_run(place / "clock")
    use = measure_goodput(record)
    spent = (datetime.fromisoformat(times[-1]) - datetime.fromisoformat(record.events[0]["began_at"])).total_seconds()
    assert use is not None and use.held() == pytest.approx(spent, abs=1.0) and use.away == 0
    assert record.metrics[-1]["time"] - record.metrics[0]["time"] < use.held()
    assert FollowedRun(place / "clock").poll().state == "finished"
    assert write_report([place / "clock"]).exists()


def compile_locale(name: str, folder: Path) -> None:
    """Make a locale in a folder that LOCPATH names."""
    if not (Path("/usr/share/i18n/locales") / name).exists() or shutil.which("localedef") is None:
        pytest.skip("NOT TESTED: needs Debian's package locales")
    subprocess.run(["localedef", "-i", name, "-f", "UTF-8", str(folder / f"{name}.UTF-8")], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["C", "tr_TR", "de_DE"])
def test_a_locale_changes_nothing(place: Path, tmp_path: Path, name: str) -> None:
    variables = {"LC_ALL": "C"}
    if name != "C":
        compile_locale(name, tmp_path)
        variables = {"LC_ALL": f"{name}.UTF-8", "LOCPATH": str(tmp_path)}
    code, said = start(place, name, "locale", variables)
    assert code == DONE, said
    assert name == "C" or "1,5" in said, "the locale was not there"
    assert losses(place / name) == losses(place / "straight")


@pytest.mark.slow
@pytest.mark.parametrize("options", [("-OO",), ("-W", "error"), ("-X", "dev")], ids=" ".join)
def test_options_of_python_change_nothing(place: Path, options: tuple[str, ...]) -> None:
    code, said = start(place, "".join(options), "nothing", options=options)
    assert code == DONE, said
    assert losses(place / "".join(options)) == losses(place / "straight")


@pytest.mark.slow
def test_a_limit_of_a_file_s_size_ends_a_run_in_words_and_the_next_start_gives_the_same(place: Path) -> None:
    code, said = start(place, "size", "size")
    assert code == RUN_FAILED, said
    assert "Traceback" not in said and "File too large" in said.splitlines()[-1], said
    assert start(place, "size", "nothing")[0] == DONE
    assert losses(place / "size") == losses(place / "straight")
