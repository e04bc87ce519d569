"""When a job is queued again, by the events of its run; Slurm's own part is in tests/cluster."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from amfm.launch.cluster.requeue import queue_rest
from amfm.launch.cluster.slurm import MAX_REFUSED, Allocation
from tests.pretrain.tiny_run import tiny_config, tiny_data


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
