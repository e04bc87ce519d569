"""Slurm as it is: time limits, requeues, arrays, salloc, nodes that are lost, drained and come back, cancelled jobs."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.cluster import (
    PATIENCE_SECONDS,
    SLURM,
    START_SECONDS,
    Cluster,
    amfm,
    catches,
    cluster,
    end_well,
    events,
    metrics,
    missing,
    quietly,
    signal_ranks,
    wait_for_steps,
    wait_until,
)
from tests.cluster.conftest import WatchRun, check_losses, write_run

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(bool(missing("slurm")), reason=missing("slurm")),
]


def launch_command(root: Path, count: int, *options: str) -> list[str]:
    """The command line that submits root/run.yaml to this many nodes, with a rank on each."""
    words = ("launch", root / "run.yaml", "--on", "slurm", "--nodes", str(count), "--nproc-per-node", "1")
    return amfm(*words, *options)


def submit(nodes: Cluster, root: Path, *options: str, count: int | None = None) -> tuple[str, Path]:
    """Submit root/run.yaml from the login node; returns the job's number and its log."""
    job = nodes.run(0, *launch_command(root, count or nodes.count, *options)).split()[-1]
    return job, root / "run" / "logs" / f"slurm-{job}.log"


@contextmanager
def training(
    folder: Path, num_nodes: int, *options: str, count: int | None = None, steps: int = 13, **overrides: Any
) -> Iterator[tuple[Cluster, str, Path]]:
    """A run on a cluster of its own that has taken these steps: the cluster, the job's number, and the job's log."""
    write_run(folder, folder / "run", **overrides)
    with cluster(num_nodes, "slurm", folder=folder) as nodes:
        job, log = submit(nodes, folder, *options, count=count)
        wait_for_steps(folder / "run", steps, log)
        yield nodes, job, log


def field(nodes: Cluster, job: str, name: str) -> str:
    """What scontrol says of a job under this name."""
    fields = dict(word.partition("=")[::2] for word in nodes.run(0, "scontrol", "-o", "show", "job", job).split())
    return fields[name]


def state(nodes: Cluster, job: str) -> str:
    return field(nodes, job, "JobState")


def let_start(nodes: Cluster, job: str) -> None:
    """Slurm holds a requeued job back for two minutes; no one needs to wait for that here, nor to keep the limit again."""
    nodes.run(0, "scontrol", "update", f"JobId={job}", "TimeLimit=60", check=False)
    if state(nodes, job) == "PENDING":
        # A node rejects a job's credential of the second in which it ended that job ("already killed").
        time.sleep(2)
        nodes.run(0, "scontrol", "update", f"JobId={job}", "StartTime=now", check=False)


def finish(nodes: Cluster, job: str, log: Path) -> None:
    def is_over() -> bool:
        let_start(nodes, job)
        return state(nodes, job) == "COMPLETED"

    wait_until(is_over, PATIENCE_SECONDS, log)


def test_a_signal_while_ranks_load_is_answered_after_the_first_step_and_the_job_is_queued_again(
    folder: Path, undisturbed: list[float], watch: WatchRun
) -> None:
    write_run(folder, folder / "run")
    with cluster(2, "slurm", folder=folder) as nodes:
        job, log = submit(nodes, folder)
        # One that comes before a rank's first line ends it, and then the launcher knows by the job's limit what it was.
        wait_until(lambda: all(catches(nodes, node, signal.SIGUSR1) for node in (1, 2)), START_SECONDS, log)
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
        job, log = submit(nodes, folder, "launch.slurm.time_limit=3", "launch.slurm.signal_seconds=60")
        wait_until(lambda: state(nodes, job) == "RUNNING", 60, log)
        # On a busy machine Slurm's own signal would come before the first step. The job's environment keeps its first end.
        nodes.run(0, "scontrol", "update", f"JobId={job}", "TimeLimit=60")
        wait_for_steps(folder / "run", 13, log)
        with watch("Slurm", "rank killed shortly before the time limit"):
            signal_ranks(nodes, 1, "KILL")
            wait_until(lambda: "remaining job time is too short" in log.read_text(), 400, log)
            finish(nodes, job, log)
    assert len(events(folder / "run", "start")) == 2
    check_losses(folder / "run", undisturbed)


def test_the_signal_before_a_time_limit_costs_no_step_and_the_next_job_goes_on(
    folder: Path, undisturbed: list[float], watch: WatchRun
) -> None:
    """Slurm's own clock sends it: ranks are stopped so that they do not reach the last step before."""
    with training(
        folder, 2, "launch.slurm.time_limit=60", launch__heartbeat_seconds=900.0, train__timeout_seconds=900.0
    ) as (nodes, job, log):
        with watch("Slurm", "time limit") as row:
            for node in (1, 2):
                signal_ranks(nodes, node, "STOP")
            # Slurm continues stopped tasks when it signals them.
            hours, minutes, _ = map(int, field(nodes, job, "RunTime").split(":"))
            nodes.run(0, "scontrol", "update", f"JobId={job}", f"TimeLimit={60 * hours + minutes + 3}")
            wait_until(lambda: "is queued again" in log.read_text(), START_SECONDS, log)
            finish(nodes, job, log)
    assert row.steps_again == 0 and row.ranks == (2, 2)
    assert not events(folder / "run", "restarted"), "no attempt failed"
    check_losses(folder / "run", undisturbed)


def test_a_node_lost_after_a_checkpoint_leaves_the_other_which_goes_on_from_it(
    folder: Path, undisturbed: list[float], watch: WatchRun
) -> None:
    with training(folder, 2, steps=23) as (nodes, job, log):
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
    with training(folder, 3, count=2, steps=23, launch__spare_nodes=1) as (nodes, job, log):
        with watch("Slurm", "power of a node lost, a spare waits"):
            nodes.fault("lose", 2)
            finish(nodes, job, log)
        text = log.read_text()
    assert "continuing with" not in text, "the run keeps its size"
    (restarted,) = events(folder / "run", "restarted")
    assert "node2" in restarted["cause"]
    check_losses(folder / "run", undisturbed)


def test_a_cancelled_job_saves_its_last_step(folder: Path, watch: WatchRun) -> None:
    # no other checkpoint may stand for it
    with training(folder, 1, steps=4, train__checkpoint_every_steps=None) as (nodes, job, log):
        with watch("Slurm", "scancel"):
            nodes.run(0, "scancel", job)
            wait_until(lambda: state(nodes, job) == "CANCELLED", 60, log)
            last = metrics(folder / "run")[-1]["step"]
            assert wait_until((folder / f"run/checkpoints/step-{last:08d}/manifest.json").exists, 30, log)


@pytest.mark.parametrize("fault", ["drained", "lost"])
def test_a_node_that_is_drained_or_lost_and_comes_back_takes_part_again_in_the_next_job(
    fault: str, folder: Path, undisturbed: list[float], watch: WatchRun
) -> None:
    with training(folder, 2) as (nodes, job, log):
        with watch("Slurm", f"node {fault}, comes back for the next job"):
            if fault == "drained":
                # A job keeps a drained node to its end; an attempt after it does without it.
                nodes.run(0, "scontrol", "update", "nodename=node2", "state=drain", "reason=test")
                signal_ranks(nodes, 1, "KILL")
            else:
                nodes.fault("lose", 2)
            wait_until(lambda: "continuing with 1 of 2 nodes" in log.read_text(), PATIENCE_SECONDS, log)
            wait_until(lambda: len(events(folder / "run", "start")) > 1, START_SECONDS, log)
            nodes.run(0, "scancel", "--signal=USR1", job)  # what slurmctld sends before the time limit
            wait_until(lambda: "is queued again" in log.read_text(), START_SECONDS, log)
            if fault == "drained":
                nodes.run(0, "scontrol", "update", "nodename=node2", "state=resume")
            else:
                nodes.fault("add", 2)
                quietly(SLURM, "node", str(folder), "2")
            finish(nodes, job, log)
    assert [event["world_size"] for event in events(folder / "run", "start")] == [2, 1, 2]
    check_losses(folder / "run", undisturbed)


def test_an_allocation_of_salloc_takes_the_ranks_and_their_restarts(
    folder: Path, undisturbed: list[float], watch: WatchRun
) -> None:
    write_run(folder, folder / "run")
    log = folder / "launch.log"
    with cluster(2, "slurm", folder=folder) as nodes:
        launcher = nodes.start(
            0, log, "salloc", "--nodes=2", "--ntasks-per-node=1", "--no-kill", *launch_command(folder, 2)
        )
        wait_for_steps(folder / "run", 13, log)
        with watch("salloc", "rank killed"):
            signal_ranks(nodes, 2, "KILL")
            end_well(launcher, log)
    assert len(events(folder / "run", "restarted")) == 1
    check_losses(folder / "run", undisturbed)


def test_each_job_of_an_array_has_its_own_run_and_is_queued_again_alone(
    folder: Path, undisturbed: list[float], watch: WatchRun
) -> None:
    """As for an ablation: one script, whose jobs without an environment of the one who submits train in folders of their own."""
    write_run(folder, folder / "run")
    words = ("launch", folder / "run.yaml", "--on", "slurm", "--nodes", "1", "--nproc-per-node", "1", "--dry-run")
    with cluster(2, "slurm", folder=folder) as nodes:
        script = nodes.run(0, *amfm(*words, "launch.slurm.extra=['--array=0-1','--export=NONE']"))
        # In double quotes, so that the shell of each job puts its number there.
        line = script.splitlines()[-1]
        own = " ".join(amfm("launch", folder / "run.yaml", f'"run.dir={folder}/run$SLURM_ARRAY_TASK_ID"', *words[2:-1]))
        (folder / "array.sbatch").write_text(script.replace(line, f"exec {own}").replace("slurm-%j", "slurm-%a"))
        (folder / "run/logs").mkdir(parents=True)
        job = nodes.run(0, "sbatch", "--parsable", str(folder / "array.sbatch"))
        log = folder / "run/logs/slurm-1.log"
        first, second = folder / "run0", folder / "run1"
        wait_until(lambda: len(metrics(second)) > 12, START_SECONDS, log)
        with watch("Slurm array", "time limit's signal to one job", second.name):
            nodes.run(0, "scancel", "--signal=USR1", f"{job}_1")
            wait_until(lambda: "is queued again" in log.read_text(), START_SECONDS, log)
            wait_until(
                lambda: state(nodes, f"{job}_0") == "COMPLETED", PATIENCE_SECONDS, folder / "run/logs/slurm-0.log"
            )
            finish(nodes, f"{job}_1", log)
    assert len(events(first, "start")) == 1 and len(events(second, "start")) == 2
    check_losses(first, undisturbed)
    check_losses(second, undisturbed)


@pytest.mark.skipif(bool(missing("slurm", "accounts")), reason=missing("slurm", "accounts"))
def test_an_account_is_charged_and_what_account_or_qos_refuse_is_said_in_slurms_words(
    folder: Path, undisturbed: list[float]
) -> None:
    write_run(folder, folder / "run")
    with cluster(1, "slurm", folder=folder, options=("2", "3000", "accounts")) as nodes:
        nodes.run(0, "sacctmgr", "-i", "add", "qos", "short", "Flags=DenyOnLimit", "MaxWall=90")
        nodes.run(0, "sacctmgr", "-i", "add", "account", "team", "qos=short")
        nodes.run(0, "sacctmgr", "-i", "add", "user", "root", "account=team", "qos=short", "defaultqos=short")
        charged = ("launch.slurm.account=team", "launch.slurm.qos=short", "launch.slurm.time_limit=60")
        for option, reason in (
            ("launch.slurm.account=nobody", "Invalid account or account/partition combination specified"),
            ("launch.slurm.qos=long", "Invalid qos specification"),
            ("launch.slurm.time_limit=120", "Job violates accounting/QOS policy"),
        ):
            refused = nodes.try_to(0, *launch_command(folder, 1, *charged, option))
            assert refused.returncode == 3 and reason in refused.stderr, refused.stderr
        job, log = submit(nodes, folder, *charged)
        finish(nodes, job, log)
        assert (field(nodes, job, "Account"), field(nodes, job, "QOS")) == ("team", "short")
        assert nodes.run(0, "sacct", "-n", "-X", "-P", "-j", job, "-o", "account,qos,state") == "team|short|COMPLETED"
    check_losses(folder / "run", undisturbed)
