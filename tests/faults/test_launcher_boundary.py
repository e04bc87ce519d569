"""Where a stage of another layout begins each launcher continues, on fewer nodes where that needs fewer; one is killed
there.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from amfm.data_pipeline.config import DataConfig
from amfm.launch.rank_command import rank_command
from tests.helpers.patience import PATIENCE_SECONDS
from tests.helpers.spawn import run_ranks
from tests.helpers.srun import NODES, write_programs
from tests.parallel.test_stage_layouts import run_layouts, staged_config
from tests.pretrain.tiny_run import read_events, read_metrics, tiny_data

# The last stage has one micro-batch per step for each of its ranks, and so runs on one of two nodes.
LAYOUTS: list[dict[str, Any]] = [{"zero_stage": 1}, {"tensor": 2, "zero_stage": 2}, {"zero_stage": 2}]
RANKS = [2, 2, 1]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    return tiny_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def whole(data: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The run on one rank, which never moves."""
    folder = tmp_path_factory.mktemp("whole")
    run_ranks(run_layouts, data, str(folder), None, len(LAYOUTS), num_ranks=1)
    return read_metrics(folder)


def write_config(data: DataConfig, folder: Path) -> Path:
    """The run of three stages as a file; the last on one data rank."""
    tree = json.loads(staged_config(data, folder / "run", LAYOUTS, len(LAYOUTS)).model_dump_json(exclude_unset=True))
    tree["stages"][-1]["micro_batch_size"] = tree["train"]["global_batch_size"]
    tree["launch"] = {"node_wait_seconds": 1}
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


@pytest.fixture(params=["torchrun", "slurm", "ray"])
def launcher(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Options of `amfm launch` for two nodes of one rank."""
    options = ["--on", request.param, "--nodes", "2", "--nproc-per-node", "1"]
    if request.param == "torchrun":
        (tmp_path / "shell").write_text('#!/bin/sh\nshift\nexec sh -c "$1"\n')
        (tmp_path / "shell").chmod(0o755)
        (tmp_path / "hosts").write_text("localhost\n127.0.0.1\n")
        with_hosts = ["--hosts", str(tmp_path / "hosts"), "--remote-shell", str(tmp_path / "shell")]
        yield [*options, *with_hosts, "--master", "localhost:29671"]
    elif request.param == "slurm":
        write_programs(tmp_path)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        monkeypatch.setenv("SLURM_JOB_ID", str(os.getpid()))
        monkeypatch.setenv("SLURM_JOB_NODELIST", ",".join(NODES))
        yield options
    else:
        import ray
        from ray.cluster_utils import Cluster

        monkeypatch.setenv("RAY_worker_niceness", "0")
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        yield [*options, "--address", cluster.address]
        ray.shutdown()
        cluster.shutdown()


def start(path: Path, options: list[str]) -> subprocess.Popen[str]:
    command = rank_command(["launch", str(path), *options])
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)


def running(path: Path) -> list[psutil.Process]:
    """Processes that name the configuration: launcher, torchruns and ranks."""
    found = psutil.process_iter(["cmdline", "pid"])
    return [p for p in found if str(path) in (p.info["cmdline"] or []) and p.info["pid"] != os.getpid()]


def check_against(whole: list[dict[str, Any]], run_dir: Path) -> None:
    lines = read_metrics(run_dir)
    assert [line["step"] for line in lines] == [line["step"] for line in whole]
    assert [line["stage"] for line in lines] == [line["stage"] for line in whole]
    # float32 sums in another order.
    assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in whole], rel=1e-5)


def finish(launcher: subprocess.Popen[str]) -> str:
    """What the launcher said, which ended well."""
    _, errors = launcher.communicate()
    assert launcher.returncode == 0, errors
    return errors


@pytest.mark.slow
def test_every_stage_runs_in_its_layout_on_the_nodes_that_it_needs(
    data: DataConfig, whole: list[dict[str, Any]], tmp_path: Path, launcher: list[str]
) -> None:
    errors = finish(start(write_config(data, tmp_path), launcher))
    check_against(whole, tmp_path / "run")
    starts = [event["world_size"] for event in read_events(tmp_path / "run", "start")]
    assert starts == RANKS, errors
    assert not read_events(tmp_path / "run", "restarted"), "a boundary is not a failure"
    assert "stage stage2 begins at step 4, in its own layout" in errors


@pytest.mark.slow
def test_a_launcher_that_is_killed_at_a_boundary_leaves_nothing_running_and_costs_no_step(
    data: DataConfig, whole: list[dict[str, Any]], tmp_path: Path, launcher: list[str]
) -> None:
    path = write_config(data, tmp_path)
    killed = start(path, launcher)
    saved = tmp_path / "run" / "checkpoints" / "step-00000002"
    while not (saved.exists() or saved.with_name(f"{saved.name}.tmp").exists()):
        assert killed.poll() is None, killed.communicate()
        time.sleep(0.002)
    os.kill(killed.pid, signal.SIGKILL)
    _, alive = psutil.wait_procs(running(path), timeout=PATIENCE_SECONDS)
    assert not alive, f"{[process.cmdline() for process in alive]} continued without their launcher"
    finish(start(path, launcher))
    check_against(whole, tmp_path / "run")
