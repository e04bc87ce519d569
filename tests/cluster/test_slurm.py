"""Slurm as it is: time limits, requeues, lost nodes, cancelled jobs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cluster.cluster import (
    PATIENCE_SECONDS,
    START_SECONDS,
    Cluster,
    amfm,
    cluster,
    events,
    kill_ranks,
    metrics,
    missing,
    wait_until,
)
from tests.cluster.conftest import WatchRun, check_losses, write_run

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(bool(missing("slurm")), reason=missing("slurm")),
]


def submit(nodes: Cluster, root: Path, *options: str, count: int | None = None) -> tuple[str, Path]:
    """Submit root/run.yaml from the login node; returns the job's number and its log."""
    answer = nodes.run(
        0,
        *amfm(
            *("launch", root / "run.yaml", "--on", "slurm", "--nodes", str(count or nodes.count)),
            *("--nproc-per-node", "1", *options),
        ),
    )
    job = answer.split()[-1]
    return job, root / "run" / "logs" / f"slurm-{job}.log"


def state(nodes: Cluster, job: str) -> str:
    fields = dict(word.partition("=")[::2] for word in nodes.run(0, "scontrol", "-o", "show", "job", job).split())
    return fields["JobState"]


def let_start(nodes: Cluster, job: str) -> None:
    """Slurm holds a requeued job back for two minutes; no one needs to wait for that here."""
    nodes.run(0, "scontrol", "update", f"JobId={job}", "StartTime=now", check=False)


def finish(nodes: Cluster, job: str, log: Path) -> None:
    def is_over() -> bool:
        let_start(nodes, job)
        return state(nodes, job) == "COMPLETED"

    wait_until(is_over, PATIENCE_SECONDS, log)


def processes_of_ranks(nodes: Cluster) -> str:
    return nodes.run(1, "pgrep", "-f", "amfm.launch train", check=False)


def test_a_signal_while_ranks_load_is_answered_after_the_first_step_and_the_job_is_queued_again(
    folder: Path, undisturbed: list[float], watch: WatchRun
) -> None:
    write_run(folder, folder / "run")
    with cluster(2, "slurm", folder=folder) as nodes:
        job, log = submit(nodes, folder)
        wait_until(lambda: processes_of_ranks(nodes), START_SECONDS, log)
        with watch("Slurm", "time limit's signal while ranks load"):
            # What slurmctld sends before the time limit, to every rank of the step.
            nodes.run(0, "scancel", "--signal=USR1", job)
            assert not metrics(folder / "run"), "the signal came too late for this test"
            wait_until(lambda: "is queued again" in log.read_text(), START_SECONDS, log)
            assert [line["step"] for line in metrics(folder / "run")] == [1]
            finish(nodes, job, log)
    check_losses(folder / "run", undisturbed)
    assert not events(folder / "run", "restarted"), "no attempt failed"


def test_a_job_whose_limit_is_near_is_queued_again_instead_of_started(
    folder: Path, undisturbed: list[float], watch: WatchRun
) -> None:
    """A rank dies so late in the job that another attempt would be killed at the limit, which Slurm does not requeue."""
    write_run(folder, folder / "run")
    with cluster(1, "slurm", folder=folder) as nodes:
        # The limit is farther away than the signal alone, and nearer than signal and start together.
        job, log = submit(nodes, folder, "launch.slurm.time_limit=3", "launch.slurm.signal_seconds=60")
        wait_until(lambda: len(metrics(folder / "run")) > 12, START_SECONDS, log)
        with watch("Slurm", "rank killed shortly before the time limit"):
            kill_ranks(nodes, 1)
            wait_until(lambda: "too little is left" in log.read_text(), 400, log)
            wait_until(lambda: state(nodes, job) in ("PENDING", "RUNNING", "COMPLETED"), 60, log)
            nodes.run(0, "scontrol", "update", f"JobId={job}", "TimeLimit=60", check=False)
            finish(nodes, job, log)
    check_losses(folder / "run", undisturbed)


def test_a_node_lost_after_a_checkpoint_leaves_the_other_which_goes_on_from_it(
    folder: Path, undisturbed: list[float], watch: WatchRun
) -> None:
    write_run(folder, folder / "run")
    with cluster(2, "slurm", folder=folder) as nodes:
        job, log = submit(nodes, folder)
        wait_until(lambda: len(metrics(folder / "run")) > 22, START_SECONDS, log)
        with watch("Slurm", "power of a node lost"):
            nodes.fault("lose", 2)
            finish(nodes, job, log)
        text = log.read_text()
    assert "continuing with 1 of 2 nodes" in text
    (restarted,) = events(folder / "run", "restarted")
    assert "node" in restarted["cause"] and "===" not in restarted["cause"]
    check_losses(folder / "run", undisturbed)


def test_a_spare_node_of_the_job_takes_the_place_of_a_lost_one(
    folder: Path, undisturbed: list[float], watch: WatchRun
) -> None:
    write_run(folder, folder / "run", launch__spare_nodes=1)
    with cluster(3, "slurm", folder=folder) as nodes:
        job, log = submit(nodes, folder, count=2)
        wait_until(lambda: len(metrics(folder / "run")) > 22, START_SECONDS, log)
        with watch("Slurm", "power of a node lost, a spare waits"):
            nodes.fault("lose", 2)
            finish(nodes, job, log)
        text = log.read_text()
    assert "continuing with" not in text, "the run keeps its size"
    (restarted,) = events(folder / "run", "restarted")
    assert "node2" in restarted["cause"]
    check_losses(folder / "run", undisturbed)


def test_a_cancelled_job_saves_its_last_step(folder: Path, watch: WatchRun) -> None:
    write_run(folder, folder / "run", train__checkpoint_every_steps=None)  # no other checkpoint may stand for it
    with cluster(1, "slurm", folder=folder) as nodes:
        job, log = submit(nodes, folder)
        wait_until(lambda: len(metrics(folder / "run")) > 3, START_SECONDS, log)
        with watch("Slurm", "scancel"):
            nodes.run(0, "scancel", job)
            wait_until(lambda: state(nodes, job) == "CANCELLED", 60, log)
            last = metrics(folder / "run")[-1]["step"]
            wait_until((folder / f"run/checkpoints/step-{last:08d}/manifest.json").exists, 30, log)
