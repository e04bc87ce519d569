"""Ranks run our packages, whatever is in the working directory."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

import amfm
from amfm.launch.cluster.local import run_command, run_here, torchrun_command
from amfm.launch.rank_command import rank_command

SOURCE = Path(amfm.__path__[0]).parent
ROOT = Path(__file__).parents[2]
# benchmarks/ is left out: a clone is its working directory, without which `python -m benchmarks.NAME` finds nothing.
PACKAGES = ("launch", "pretrain", "data_pipeline", "model", "kernels")
PLANTED = "raise SystemExit('a file of the working directory ran instead of ours')"


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


def test_local_ranks_are_apart_from_the_working_directory(planted: Path) -> None:
    assert run_command(rank_command(["--help"]), 1) == 0


@pytest.mark.slow
def test_torchruns_ranks_are_apart_from_the_working_directory(planted: Path) -> None:
    """Quick, by its source: `test_every_process_of_ours_is_started_apart_from_the_working_directory`."""
    of_one = {"nodes": 1, "ranks_per_node": 1, "node_rank": 0, "master": "localhost", "port": 0, "max_restarts": 0}
    assert run_here(torchrun_command(["--help"], **of_one), node_rank=0, master="localhost", port=of_one["port"]) == 0


# Where a path of the interpreter is not a start of a command line, or one that is given by the user.
ELSEWHERE = {
    ("launch/doctor/machine.py", "printed"),
}


def test_every_process_of_ours_is_started_apart_from_the_working_directory() -> None:
    """Each `sys.executable` in the packages begins a list that continues with -P or -I, or is named above with the
    reason.
    """
    found = set()
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            text = path.read_text(encoding="utf-8")
            if "sys.executable" not in text:
                continue
            tree = ast.parse(text)
            uses = sum(is_interpreter(node) for node in ast.walk(tree))
            apart = sum(starts_apart(node) for node in ast.walk(tree))
            if uses > apart:
                found.add(path.relative_to(ROOT).as_posix())
    assert found == {name for name, _ in ELSEWHERE if (ROOT / name).exists()}


def is_interpreter(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and node.attr == "executable" and ast.unparse(node.value) == "sys"


def starts_apart(node: ast.AST) -> bool:
    """Whether a list holds the interpreter and, next to it, the option that leaves the working directory out."""
    parts = node.elts if isinstance(node, ast.List) else []
    return any(
        is_interpreter(part) and isinstance(option, ast.Constant) and option.value in ("-P", "-I")
        for part, option in pairwise(parts)
    )


@pytest.mark.slow
def test_a_clone_that_is_not_installed_runs_with_pythonpath_alone(tmp_path: Path) -> None:
    script = (
        "import sys; from amfm.launch.cluster.local import run_command; from amfm.launch.rank_command import rank_command; "
        "sys.exit(run_command(rank_command(['--help']), 2))"
    )
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, check=True, stdout=subprocess.DEVNULL)
