"""What `make install` says and asks before packages are installed; nothing is installed here."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a space and an umlaut, as homes have, and what make reads of the clone."""
    made = tmp_path / "Mein Ördner"
    made.mkdir()
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, made)
    return made


def make(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = ["make", f"PYTHON={sys.executable}", *words]
    alone = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}
    return subprocess.run(command, cwd=folder, env=alone, check=False, capture_output=True, text=True)


def test_an_installation_names_what_it_takes_and_shows_its_progress(folder: Path) -> None:
    said = make(folder, "--dry-run", "install").stdout
    assert "3.3 GB to download" in said and "6.3 GB on disk" in said and "TORCH_INDEX=" in said
    (step,) = (line for line in said.splitlines() if "--editable '.[all]'" in line)
    installs = step.rsplit("&&", 1)[1]
    assert "uv pip install" in installs and "--quiet" not in installs
    assert f'UV_CACHE_DIR="{folder}/.venv/unpacked"' in installs, "not in a memory that is called /tmp"
    assert said.index("3.3 GB") < said.index("--editable") < said.rindex("rm -rf .venv/unpacked")
    assert said.splitlines()[-1] == "touch .venv/.installed"


def test_an_index_of_cpu_wheels_gives_torch_first(folder: Path) -> None:
    said = make(folder, "--dry-run", "install", "TORCH_INDEX=https://index/cpu").stdout
    assert said.index('torch --index-url "https://index/cpu"') < said.index("--editable")


def test_pip_installs_where_its_own_settings_are_needed(folder: Path) -> None:
    said = make(folder, "--dry-run", "install", "INSTALLER=pip").stdout
    assert f'TMPDIR="{folder}/.venv/unpacked" .venv/bin/python -m pip install --no-compile --editable' in said
    assert "uv" not in said


def test_uv_takes_the_index_of_pips_settings(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uv = folder / ".venv" / "bin" / "uv"
    uv.parent.mkdir(parents=True)
    uv.write_text('#!/bin/sh\necho "index: $UV_DEFAULT_INDEX"\n', encoding="utf-8")
    uv.chmod(0o755)
    (uv.parent / "python").symlink_to(sys.executable)
    monkeypatch.delenv("UV_DEFAULT_INDEX", raising=False)
    monkeypatch.setenv("PIP_INDEX_URL", "https://mirror/simple")
    assert "index: https://mirror/simple" in make(folder, "install").stdout


def test_a_disk_that_is_too_small_is_refused_before_anything_is_made(folder: Path) -> None:
    done = make(folder, "install", "INSTALL_GB=100000000")
    assert done.returncode == 2 and "installing amfm needs 100000000 GB of disk" in done.stdout
    assert not (folder / ".venv").exists()


def test_the_quickstart_ends_with_the_commands_that_come_next(folder: Path) -> None:
    assert "source .venv/bin/activate; amfm init my" in make(folder, "--dry-run", "quickstart").stdout.splitlines()[-1]
