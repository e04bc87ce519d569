"""Slurm's programs while the controller is away, by programs of that name that behave so."""

from __future__ import annotations

from pathlib import Path

import pytest

from amfm.launch.cluster import controller
from amfm.launch.cluster.controller import ask, name_job


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program that fails twice in the words of its file, and then answers."""
    monkeypatch.setattr(controller, "PAUSE_SECONDS", 0.0)
    path = tmp_path / "sinfo"
    path.write_text(
        f"#!/bin/sh\necho >>{tmp_path}/calls\n[ $(wc -l <{tmp_path}/calls) -gt 2 ] && exec echo up\ncat {tmp_path}/words >&2; exit 1\n"
    )
    path.chmod(0o755)
    return path


def test_a_controller_that_is_away_is_asked_again_and_that_is_said_once(
    program: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "words").write_text("slurm_load_node: Unable to contact slurm controller (connect failure)\n")
    assert ask(str(program)) == "up\n"
    assert capsys.readouterr().err.count("Slurm's controller does not answer") == 1


def test_a_refusal_is_not_repeated(program: Path, tmp_path: Path) -> None:
    (tmp_path / "words").write_text("scontrol: error: Invalid job id specified\n")
    with pytest.raises(RuntimeError, match="Invalid job id"):
        ask(str(program))


@pytest.mark.parametrize(("task", "named"), [(None, "7"), ("3", "5_3")])
def test_a_job_of_an_array_is_named_alone(monkeypatch: pytest.MonkeyPatch, task: str | None, named: str) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID", raising=False)
    if task is not None:
        monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "5")
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", task)
    assert name_job() == named
