"""Ranks run our packages, whatever lies in the working directory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import amfm
from amfm.launch.cluster.local import run_command
from amfm.launch.cluster.torchrun import NodeCommand, run_here
from amfm.launch.rank_command import rank_command

SOURCE = Path(amfm.__path__[0]).parent
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
    monkeypatch.setenv("PYTHONPATH", str(SOURCE))
    return tmp_path


def test_local_ranks_and_torchruns_ranks_are_apart_from_the_working_directory(planted: Path) -> None:
    assert run_command(rank_command(["--help"]), 2) == 0
    assert run_here(NodeCommand(["--help"], 1, 1, 0, "localhost", 0), max_restarts=0) == 0


def test_a_clone_that_is_not_installed_runs_with_pythonpath_alone(tmp_path: Path) -> None:
    script = (
        "import sys; from amfm.launch.cluster.local import run_command; from amfm.launch.rank_command import rank_command; "
        "sys.exit(run_command(rank_command(['--help']), 2))"
    )
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, check=True, stdout=subprocess.DEVNULL)
