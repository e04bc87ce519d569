"""A run has one launcher, and a second one ends with the name of the first."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from amfm.launch.cluster import one_launcher
from amfm.launch.cluster.one_launcher import only_launcher
from amfm.pretrain.monitor.ownership import lock_directory


def test_a_second_launcher_names_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(one_launcher, "LEAVING_SECONDS", 0.0)
    monkeypatch.setattr(one_launcher, "POLL_SECONDS", 0.0)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with only_launcher(tmp_path):
        with pytest.raises(ValueError, match=rf"has another launcher \(process {os.getpid()} on .*, job 7\); wait"):
            with only_launcher(tmp_path):
                pass
        with lock_directory(tmp_path):  # its ranks
            pass
    with (
        lock_directory(tmp_path),
        pytest.raises(ValueError, match="another process trains in"),
        only_launcher(tmp_path),
    ):
        pass
    with only_launcher(tmp_path):
        pass
