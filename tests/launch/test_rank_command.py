"""Ranks run our packages, whatever lies in the working directory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from amfm.launch.cluster.local import run_command
from amfm.launch.cluster.torchrun import NodeCommand, run_here
from amfm.launch.rank_command import ROOT, rank_command

PLANTED = "raise SystemExit('a file of the working directory ran in the place of ours')"


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with files of our names and of torch's."""
    for name in ("amfm", "launch", "torch"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(PLANTED)
    (tmp_path / "amfm.py").write_text(PLANTED)
    (tmp_path / "typer.py").write_text(PLANTED)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return tmp_path


def test_local_ranks_and_torchruns_ranks_are_apart_from_the_working_directory(planted: Path) -> None:
    assert run_command(rank_command(["--help"]), 2) == 0
    assert run_here(NodeCommand(["--help"], 1, 1, 0, "localhost", 0), max_restarts=0) == 0


def test_a_source_tree_without_installation_finds_itself(tmp_path: Path) -> None:
    """Started by `python -m amfm.launch` from the tree: our packages are known through the working directory alone."""
    script = (
        "import subprocess, sys, os; from amfm.launch.rank_command import rank_command, source_variables;"
        "sys.exit(subprocess.run(rank_command(['--help']), cwd=sys.argv[1], env=os.environ | source_variables()).returncode)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", script, str(tmp_path)]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
