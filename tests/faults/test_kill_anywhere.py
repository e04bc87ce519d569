"""kill -9 at random moments of real runs, starting, stepping and saving: every end is that of a run never killed."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch.distributed

from data_pipeline.config import DataConfig
from pretrain.checkpoint_read import diff_checkpoints
from pretrain.train import train
from tests.helpers.spawn import run_ranks
from tests.pretrain.tiny_run import read_events, tiny_config, tiny_data

STEPS = 14
PATIENCE_SECONDS = 60.0


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    return tiny_data(tmp_path_factory.mktemp("data"))


@dataclass
class Attempt:
    """The ranks of one start of a run, each a forked process: what they import is in memory already."""

    data: DataConfig
    run_dir: Path
    settings: dict[str, Any]
    num_ranks: int
    pids: list[int] = field(default_factory=list)

    def start(self) -> None:
        store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.store = store
        for rank in range(self.num_ranks):
            pid = os.fork()
            if pid == 0:
                self.be_rank(rank, store.port)
            self.pids.append(pid)

    def be_rank(self, rank: int, port: int) -> None:
        ranks = str(self.num_ranks)
        os.environ.update(RANK=str(rank), WORLD_SIZE=ranks, LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=ranks)
        os.environ.update(MASTER_PORT=str(port))
        code = 1
        try:
            code = train(tiny_config(self.data, self.run_dir, train__steps=STEPS, **self.settings))
        finally:
            os._exit(code)

    def has_ended(self) -> bool:
        return os.waitid(os.P_PID, self.pids[0], os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None

    def finish(self) -> list[int]:
        """Exit codes (negative: signals) of all ranks, which must come within the patience."""
        deadline, codes = time.monotonic() + PATIENCE_SECONDS, {}
        while len(codes) < len(self.pids):
            assert time.monotonic() < deadline, "a rank outlived the others"
            for pid in self.pids:
                found, status = (0, 0) if pid in codes else os.waitpid(pid, os.WNOHANG)
                if found:
                    codes[pid] = os.waitstatus_to_exitcode(status)
            time.sleep(0.002)
        return [codes[pid] for pid in self.pids]


def count_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def kill_and_resume(
    data: DataConfig, place: str, settings: dict[str, Any], num_ranks: int, num_kills: int
) -> dict[str, Any]:
    """A run that nobody kills, and one that is killed so often; returns what differs between their ends."""
    moments = random.Random(len(settings) + num_ranks)
    straight = Attempt(data, Path(place, "straight"), settings, num_ranks)
    begun = time.monotonic()
    straight.start()
    assert straight.finish() == [0] * num_ranks
    # Most of a start goes into building the model and the engine; the rest, roughly, is steps and saves.
    seconds = time.monotonic() - begun
    run_dir = Path(place, "killed")
    metrics = run_dir / "metrics.jsonl"
    kills = 0
    while kills < num_kills:
        attempt = Attempt(data, run_dir, settings, num_ranks)
        lines = count_lines(metrics)
        attempt.start()
        if kills % 4 == 3:
            time.sleep(moments.uniform(0, seconds / 2))
        else:
            while count_lines(metrics) <= lines and not attempt.has_ended():
                time.sleep(0.001)
            time.sleep(moments.uniform(0, 2.5 * seconds / (STEPS + 10)))
        victim = moments.randrange(num_ranks)
        if attempt.has_ended() or count_lines(metrics) >= STEPS:
            # It came too far: begin a new run, so that each kill falls on a living one.
            attempt.finish()
            shutil.rmtree(run_dir)
            continue
        os.kill(attempt.pids[victim], signal.SIGKILL)
        codes = attempt.finish()
        assert codes[victim] == -signal.SIGKILL and 0 not in codes, codes
        kills += 1
    last = Attempt(data, run_dir, settings, num_ranks)
    last.start()
    assert last.finish() == [0] * num_ranks
    name = f"checkpoints/step-{STEPS:08d}"
    difference = diff_checkpoints(straight.run_dir / name, run_dir / name)
    starts = read_events(run_dir, "start")
    passed_over = [event for event in read_events(run_dir, "resume") if event["kind"] == "passed over"]
    return {**difference, "resumed": [event["resumed_from"] for event in starts], "passed_over": passed_over}


def check_same_end(result: dict[str, Any], num_kills: int) -> None:
    assert result["tensors"] == {} and result["only_in_first"] == result["only_in_second"] == []
    assert result["state"] == {}
    assert list(result["settings"]) == ["run.dir"]
    assert result["passed_over"] == []
    # Some starts were killed before they wrote a line.
    assert 1 <= sum(name is not None for name in result["resumed"]) <= num_kills + 1


def test_a_run_killed_three_times_ends_in_the_same_weights(data: DataConfig, tmp_path: Path) -> None:
    settings = {"train__checkpoint_every_steps": 1, "train__precision": "bf16", "train__keep_last": 2}
    result = run_ranks(kill_and_resume, data, str(tmp_path), settings, 1, 3, num_ranks=1)[0]
    check_same_end(result, 3)


@pytest.mark.slow
@pytest.mark.parametrize(("num_ranks", "stage", "precision"), [(1, 1, "float32"), (2, 2, "bf16"), (2, 3, "float32")])
def test_a_run_killed_ten_times_ends_in_the_same_weights(
    data: DataConfig, tmp_path: Path, num_ranks: int, stage: int, precision: str
) -> None:
    settings = {
        "train__checkpoint_every_steps": 2,
        "train__precision": precision,
        "train__validate_every_steps": 5,
        "parallel__zero_stage": stage,
    }
    result = run_ranks(kill_and_resume, data, str(tmp_path), settings, num_ranks, 10, num_ranks=1)[0]
    check_same_end(result, 10)
