"""Two launchers of one run on two hosts whose file system does not share locks: one of them trains, whatever happens."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import pytest

from amfm.pretrain.launcher_protocol import RUN_FAILED
from amfm.pretrain.monitor.beats import Beat
from amfm.pretrain.monitor.heartbeat import HUNG
from amfm.pretrain.monitor.ownership import Ownership, require_silence
from tests.faults.disk import fault, with_faults
from tests.helpers.patience import PATIENCE_SECONDS
from tests.pretrain.tiny_run import read_events, read_metrics, tiny_data

STEPS = 24
SETTINGS = {"train__steps": STEPS, "train__checkpoint_every_steps": 4, "launch__heartbeat_seconds": 60}
FENCED = (
    "import sys, time\n"
    "from pathlib import Path\n"
    "from amfm.pretrain.monitor.heartbeat import Heartbeat\n"
    "from amfm.pretrain.monitor.ownership import Ownership\n"
    "heartbeat = Heartbeat(Path(sys.argv[1]), rank=0, timeout_seconds=900)\n"
    "heartbeat.interval = 0.1\n"
    "heartbeat.fence = Ownership.take(Path(sys.argv[1])).check\n"
    "heartbeat.start()\n"
    "print('ready', flush=True)\n"
    "while True:\n"
    "    heartbeat.at(1, 'forward')\n"
    "    time.sleep(0.1)\n"
)


def test_a_start_is_refused_while_a_rank_of_another_host_beats(tmp_path: Path) -> None:
    folder, stop = tmp_path / "heartbeats", threading.Event()
    folder.mkdir()

    def live() -> None:
        while not stop.wait(0.2):  # short: between beats
            beat = Beat(0, "elsewhere", 7, "forward", time.time() - 1e6)  # its clock is behind
            (folder / "rank-0.tmp").write_text(json.dumps(asdict(beat)))
            os.replace(folder / "rank-0.tmp", folder / "rank-0.json")

    thread = threading.Thread(target=live)
    thread.start()
    time.sleep(0.5)
    with pytest.raises(RuntimeError, match=r"rank 0 on elsewhere trains in .*, at step 7; end that run"):
        require_silence(tmp_path)
    stop.set()
    thread.join()
    require_silence(tmp_path)


def test_who_was_replaced_ends_and_may_not_save(tmp_path: Path) -> None:
    old = subprocess.Popen(
        [sys.executable, "-c", FENCED, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert old.stdout is not None and old.stdout.readline() == "ready\n"
    new = Ownership.take(tmp_path)
    words = old.communicate()[1]
    assert old.returncode == HUNG and f"process {os.getpid()} on " in words and "writes nothing more" in words
    new.check()
    Ownership.take(tmp_path)
    with pytest.raises(RuntimeError, match="another start of this run became the owner"):
        new.check()


class Host:
    """A launcher of the run on its own host, and its result when it has ended; each step waits until `hurry`."""

    def __init__(self, place: Path, name: str, data: Any, run_dir: Path, *, step_seconds: float = 0.5) -> None:
        self.place, self.name = place / name, name
        self.place.mkdir()
        run = {"run": str(run_dir), "settings": SETTINGS, "ranks": 1}
        jobs = {"data": data, "runs": {"run": run}}
        (self.place / "jobs.json").write_text(json.dumps(jobs))
        wait = fault("write", "*/metrics.jsonl", f"sleep={step_seconds}", when=self.place / "run.on")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.storage_child", str(self.place)],
            env={**with_faults([fault("flock", "*/lock", "ignore"), wait]), "AMFM_HOST": name},
            stderr=subprocess.PIPE,
            text=True,
        )

    def finish(self) -> tuple[int, str]:
        """Exit code and words of its rank."""
        words = self.process.communicate(timeout=PATIENCE_SECONDS)[1]
        result = json.loads((self.place / "results.json").read_text())["run"]
        return result["codes"][0], result["said"][0] + words

    def hurry(self) -> None:
        """Let its steps wait no more."""
        (self.place / "run.on").unlink()

    def signal(self, number: signal.Signals) -> None:
        """To its rank."""
        for child in psutil.Process(self.process.pid).children(recursive=True):
            child.send_signal(number)


def wait_for_step(run_dir: Path, step: int) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not (run_dir / "metrics.jsonl").exists() or len(read_metrics_so_far(run_dir)) < step:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def read_metrics_so_far(run_dir: Path) -> list[str]:
    return (run_dir / "metrics.jsonl").read_text().splitlines()


@pytest.mark.slow
def test_a_second_launcher_on_another_host_is_refused_and_harms_nothing(tmp_path: Path) -> None:
    data = tiny_data(tmp_path / "data").model_dump(mode="json")
    first = Host(tmp_path, "first", data, tmp_path / "run", step_seconds=4)  # 90 s for `second` to come
    wait_for_step(tmp_path / "run", 1)
    code, words = Host(tmp_path, "second", data, tmp_path / "run").finish()
    assert code == RUN_FAILED and "rank 0 on first trains in " in words
    first.hurry()
    assert first.finish()[0] == 0
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == list(range(1, STEPS + 1))
    assert len(read_events(tmp_path / "run", "start")) == 1


@pytest.mark.slow
def test_a_host_that_comes_back_after_it_was_replaced_ends_and_saves_nothing(tmp_path: Path) -> None:
    data, run_dir = tiny_data(tmp_path / "data").model_dump(mode="json"), tmp_path / "run"
    first = Host(tmp_path, "first", data, run_dir)
    wait_for_step(run_dir, 6)
    first.signal(signal.SIGSTOP)  # cut off from the network, as seen by the others
    second = Host(tmp_path, "second", data, run_dir)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while len(read_events(run_dir, "start")) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    first.signal(signal.SIGCONT)
    code, words = first.finish()
    assert code == RUN_FAILED and "became the owner of" in words and " on second)" in words
    assert second.finish()[0] == 0
    straight = Host(tmp_path, "third", data, tmp_path / "straight", step_seconds=0)
    assert straight.finish()[0] == 0
    losses = [
        {line["step"]: line["loss"] for line in read_metrics(place)} for place in (run_dir, tmp_path / "straight")
    ]
    assert losses[0] == losses[1]
