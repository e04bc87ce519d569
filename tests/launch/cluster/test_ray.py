"""Launching on a real Ray cluster of three local nodes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util import placement_group, remove_placement_group

from amfm.launch.cluster.ray import RankHost, RayCluster
from amfm.launch.cluster.supervise import Attempt
from amfm.pretrain.config.file import resolved_yaml
from amfm.pretrain.config.schema import RunConfig
from tests.helpers.patience import PATIENCE_SECONDS
from tests.pretrain.tiny_run import tiny_config, tiny_data

STEPS = 300


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Cluster]:
    """Three raylets of one CPU each, the first with the head; their workers are not nicer than other programs here.

    They ask for no token, on a machine where another cluster left one.
    """
    monkeypatch.setenv("RAY_worker_niceness", "0")
    (tmp_path / "auth_token").write_text("0" * 64)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "auth_token"))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    for _ in range(2):
        cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.mark.slow
def test_a_check_that_breaks_is_told_with_its_last_words() -> None:
    assert RankHost().check("{}", "") == ["its check ended with code 1: KeyError: 'link'"]


def test_the_log_of_a_rank_is_not_opened_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "log").symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match="symbolic links"):
        RankHost().run(["echo", "a line"], {}, str(tmp_path), "log")
    assert (tmp_path / "precious").read_text() == "precious"
    assert RankHost().run(["echo", "a line"], {}, str(tmp_path), "logs/own") == 0
    assert (tmp_path / "logs" / "own").read_text() == "a line\n"


def write_config(folder: Path, name: str) -> RunConfig:
    # 12 rows in micro-batches of 2: one, two and three ranks can share them.
    config = tiny_config(
        tiny_data(folder / "data"),
        folder / name,
        # Without experts: what ranks round otherwise may give a token another one, from which all losses after it follow.
        model__pattern="M*-M",
        model__moe=None,
        train__steps=STEPS,
        train__global_batch_size=12,
        train__checkpoint_every_steps=10,
        train__timeout_seconds=PATIENCE_SECONDS,
        launch__node_wait_seconds=3,
        launch__heartbeat_seconds=30,
    )
    (folder / f"{name}.yaml").write_text(resolved_yaml(config))
    return config


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_for_step(run_dir: Path, step: int, launcher: subprocess.Popen[str]) -> None:
    while not (lines := read_lines(run_dir / "metrics.jsonl")) or lines[-1]["step"] < step:
        assert launcher.poll() is None, launcher.communicate()
        time.sleep(0.05)


def rank_processes(config_path: Path) -> list[psutil.Process]:
    wanted = ["-m", "amfm.launch", "train", str(config_path)]
    return [process for process in psutil.process_iter(["cmdline"]) if (process.info["cmdline"] or [])[2:6] == wanted]


@pytest.mark.slow
def test_a_run_survives_a_lost_worker_and_a_lost_node_with_the_losses_of_an_undisturbed_one(
    cluster: Cluster, tmp_path: Path
) -> None:
    config = write_config(tmp_path, "disturbed")
    path, run_dir = tmp_path / "disturbed.yaml", Path(config.run.dir)
    command = [sys.executable, "-m", "amfm.launch", "launch", str(path), "--on", "ray", "--nodes", "3"]
    launcher = subprocess.Popen([*command, "--address", cluster.address], stderr=subprocess.PIPE, text=True)
    wait_for_step(run_dir, 25, launcher)
    rank_processes(path)[1].kill()
    before = len(read_lines(run_dir / "events.jsonl"))
    while len([event for event in read_lines(run_dir / "events.jsonl") if event["event"] == "start"]) < 2:
        assert launcher.poll() is None, launcher.communicate()
        time.sleep(0.1)
    wait_for_step(run_dir, 60, launcher)
    os.kill(cluster.list_all_nodes()[-1].all_processes["raylet"][0].process.pid, signal.SIGKILL)
    _, errors = launcher.communicate()
    assert launcher.returncode == 0, errors
    assert before, "events are written"

    events = read_lines(run_dir / "events.jsonl")
    assert [event["world_size"] for event in events if event["event"] == "start"] == [3, 3, 2]
    causes = [event["cause"] for event in events if event["event"] == "restarted"]
    assert "killed by SIGKILL" in causes[0]
    assert "was lost" in causes[1]
    assert "continuing with 2 of 3 nodes" in errors

    calm = write_config(tmp_path, "calm")
    subprocess.run([sys.executable, "-m", "amfm.launch", "train", str(tmp_path / "calm.yaml")], check=True)
    losses = {line["step"]: line["loss"] for line in read_lines(run_dir / "metrics.jsonl")}
    undisturbed = {line["step"]: line["loss"] for line in read_lines(Path(calm.run.dir) / "metrics.jsonl")}
    assert losses.keys() == undisturbed.keys() == set(range(1, STEPS + 1))
    # Sums over ranks round in another order than sums over micro-batches, and 300 steps add up.
    assert losses == pytest.approx(undisturbed, rel=2e-4)


@pytest.mark.slow
def test_an_attempt_waits_for_what_the_one_before_it_still_holds(cluster: Cluster, tmp_path: Path) -> None:
    ranks = RayCluster(
        ["--help"], address=cluster.address, run_dir=str(tmp_path), ranks_per_node=1, gpus=False, wait_seconds=0.5
    )

    held = placement_group([{"CPU": 1}])
    assert held.wait(PATIENCE_SECONDS)
    freeing = threading.Timer(5.0, remove_placement_group, [held])
    freeing.start()
    outcome = ranks.start(Attempt(0, 3, None))
    freeing.join()
    assert outcome.code == 0, outcome.cause
    assert "2:  Example: amfm prepare" in (tmp_path / "logs" / "attempt-0" / "node-2.log").read_text()


@pytest.mark.slow
def test_an_attempt_on_more_nodes_than_there_are_ends_at_once(cluster: Cluster, tmp_path: Path) -> None:
    # Waiting for a fourth node would outlast the test's own time limit.
    ranks = RayCluster(
        ["--help"], address=cluster.address, run_dir=str(tmp_path), ranks_per_node=1, gpus=False, wait_seconds=1e6
    )
    outcome = ranks.start(Attempt(0, 4, None))
    assert (outcome.code, outcome.cause) == (3, "no 4 nodes with {'CPU': 1.0} free; 3 are alive and large enough")
