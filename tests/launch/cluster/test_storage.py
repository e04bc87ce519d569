"""Storage that rejects for a while is waited for, and no node is blamed for what several see."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from amfm.launch.cluster import storage
from amfm.launch.cluster.storage import StorageWait, blame_storage, describe_refusal
from amfm.launch.cluster.supervise import Attempt, Outcome, supervise
from tests.pretrain.tiny_run import tiny_config, tiny_data

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_what_several_nodes_see_is_the_storage_s_and_what_one_sees_its_own(tmp_path: Path) -> None:
    (tmp_path / "launch").mkdir()
    full = describe_refusal(tmp_path, FULL)
    blame_storage({"node1": [], "node2": [full], "node3": ["its clock is 300 s behind"]}, tmp_path)
    with pytest.raises(OSError, match="No space left on device on node1, node2") as caught:
        blame_storage({"node1": [full], "node2": [full, "x"], "node3": []}, tmp_path)
    assert caught.value.errno == errno.ENOSPC
    (tmp_path / "launch").rmdir()
    with pytest.raises(FileNotFoundError):  # this launcher cannot write there either
        blame_storage({"node1": [], "node2": [full]}, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_refusal_is_waited_for_and_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(storage, "LOOK_SECONDS", 0.0)
    answers = [FULL, OSError(errno.EROFS, os.strerror(errno.EROFS)), None]

    def attempt() -> str:
        if (error := answers.pop(0)) is not None:
            raise error
        return "done"

    wait = StorageWait(tmp_path, 300)
    assert wait.until(attempt) == "done" and not answers
    assert capsys.readouterr().err.count("waiting for the storage") == 1
    wait.limit = wait.deadline = 0.0  # short: the wait is over before it begins
    answers += [FULL]
    with pytest.raises(RuntimeError, match=r"No space left on device, for 0 s \(launch\.storage_wait_seconds\)"):
        wait.until(attempt)
    with pytest.raises(PermissionError):  # which does not pass
        wait.refuse(PermissionError(errno.EACCES, "no"))
    assert not list((tmp_path / "launch").iterdir())


def test_an_attempt_whose_check_finds_the_storage_full_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "LOOK_SECONDS", 0.0)
    config = tiny_config(tiny_data(tmp_path / "data"), tmp_path / "run", launch__max_restarts=0)
    attempts = []

    def start(attempt: Attempt) -> Outcome:
        attempts.append(attempt.number)
        if len(attempts) < 5:
            raise FULL
        return Outcome(0)

    assert supervise(config, start, nodes=1, ranks_per_node=1, usable_nodes=lambda: 1) == 0
    assert attempts == [0] * 5
