"""One launcher for a run, and when a job is queued again, by the events of its run; Slurm's own part is in tests/cluster."""

from __future__ import annotations

import json
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from amfm.launch.cluster import launcher, storage
from amfm.launch.cluster.launcher import launching, only_launcher, queue_rest
from amfm.launch.cluster.slurm import MAX_REFUSED, Allocation
from amfm.pretrain.monitor.ownership import lock_directory
from tests.pretrain.tiny_run import tiny_config, tiny_data


def test_a_second_launcher_names_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "LEAVING_SECONDS", 0.0)
    monkeypatch.setattr(launcher, "POLL_SECONDS", 0.0)
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


@pytest.mark.parametrize(
    ("events", "fields", "signalled", "queued"),
    [
        ([{"event": "signal"}], "JobState=RUNNING BatchFlag=1", False, True),
        ([{"event": "end", "reason": "stop_after_steps"}], "JobState=RUNNING BatchFlag=1", False, False),
        ([{"event": "end", "reason": "finished"}], "JobState=RUNNING BatchFlag=1", True, False),
        ([], "JobState=RUNNING BatchFlag=1", True, True),  # before there were ranks
        ([], "JobState=RUNNING BatchFlag=1", False, False),
        ([{"event": "signal"}], "JobState=CANCELLED BatchFlag=1", False, False),
        ([{"event": "signal"}], "JobState=RUNNING BatchFlag=0", False, False),  # salloc
    ],
)
def test_a_job_is_queued_again_where_a_signal_stopped_its_run(
    events: list[dict[str, str]],
    fields: str,
    signalled: bool,
    queued: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "scontrol").write_text(
        f'#!/bin/sh\n[ "$1" = requeue ] && exec touch {tmp_path}/queued-$2\necho "JobId=7 {fields}"\n'
    )
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    for name in ("SLURM_ARRAY_TASK_ID", "SLURM_JOB_END_TIME"):
        monkeypatch.delenv(name, raising=False)
    config = tiny_config(tiny_data(tmp_path / "data"), tmp_path / "run")
    log = tmp_path / "run/events.jsonl"
    log.parent.mkdir()
    log.write_text('{"event": "signal"}\n')  # of the job before
    allocation = Allocation(config, ["train"], ranks_per_node=1)
    allocation.was_signalled = signalled
    with log.open("a") as file:
        file.writelines(json.dumps(event) + "\n" for event in events)
    assert queue_rest(config, allocation, 0) == 0
    assert (tmp_path / "queued-7").exists() == queued
    (tmp_path / "queued-7").unlink(missing_ok=True)
    allocation.refused = MAX_REFUSED  # Slurm starts no steps
    assert queue_rest(config, allocation, 0) == 0
    is_left = "end" not in [event["event"] for event in events] and fields == "JobState=RUNNING BatchFlag=1"
    assert (tmp_path / "queued-7").exists() == is_left
