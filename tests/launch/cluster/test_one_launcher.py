"""A run has one launcher, and a second one ends with the name of the first."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from amfm.launch.cluster import one_launcher, storage
from amfm.launch.cluster.one_launcher import launching, only_launcher
from amfm.pretrain.monitor.ownership import lock_directory
from tests.pretrain.tiny_run import tiny_config, tiny_data


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


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "disk"
    path.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(path)], check=False, capture_output=True).returncode:
        pytest.skip("needs root that may mount a tmpfs")
    yield path
    subprocess.run(["umount", "--lazy", str(path)], check=True)


def test_storage_that_is_read_only_at_a_launcher_s_start_is_waited_for_where_the_run_has_a_checkpoint(
    tmp_path: Path, disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(storage, "LOOK_SECONDS", 0.05)
    config = tiny_config(tiny_data(tmp_path / "data"), disk / "run")

    def remount(how: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{how}", str(disk)], check=True)

    remount("ro")
    with pytest.raises(OSError, match="Read-only file system"), launching(config):
        pass
    remount("rw")
    (disk / "run/checkpoints/step-00000001").mkdir(parents=True)
    remount("ro")
    repair = threading.Timer(0.2, remount, ["rw"])
    repair.start()
    with launching(config):
        assert (disk / "run/launch/launcher.json").is_file()
    repair.join()
    assert "Read-only file system; waiting for the storage" in capsys.readouterr().err
