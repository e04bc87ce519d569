"""Slurm's launcher itself: its host is lost, the controller is away, signals reach only it, the run stops on purpose."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.cluster.cluster import (
    RANK,
    SLURM,
    START_SECONDS,
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
from tests.cluster.test_slurm import field, finish, launch_command, state, submit, training

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(bool(missing("slurm")), reason=missing("slurm")),
]


def test_a_job_whose_batch_host_is_lost_is_queued_again_by_its_other_node(
    folder: Path, undisturbed: list[float], watch: WatchRun
) -> None:
    """Slurm would leave it running, with nothing in it, until its time limit."""
    with training(folder, 3, count=2) as (nodes, job, log):
        with watch("Slurm", "power of the batch host lost"):
            nodes.fault("lose", int(field(nodes, job, "BatchHost").removeprefix("node")))
            wait_until(lambda: field(nodes, job, "Restarts") == "1", 300, log)
            finish(nodes, job, log)
        text = log.read_text()
    assert "continuing in the job that was queued again" in text
    (restarted,) = events(folder / "run", "restarted")
    assert "the batch host node1 was lost" in restarted["cause"]
    check_losses(folder / "run", undisturbed)


def test_a_run_that_stops_on_purpose_is_not_queued_again_in_a_folder_of_any_name(folder: Path) -> None:
    """Slurm replaces what follows a % in the names of its files."""
    root = folder / "größe 50 %j"
    write_run(folder, root / "run")
    with cluster(1, "slurm", folder=folder) as nodes:
        job, log = submit(nodes, root, "train.stop_after_steps=3")
        # A job is PENDING before its start too: one that is queued again has a restart.
        wait_until(lambda: state(nodes, job) == "COMPLETED" or field(nodes, job, "Restarts") != "0", START_SECONDS, log)
        assert (state(nodes, job), field(nodes, job, "Restarts")) == ("COMPLETED", "0")
    assert [event["reason"] for event in events(root / "run", "end")] == ["stop_after_steps"]
    assert "stopped at step 3 of" in log.read_text() and {path.name for path in root.iterdir()} == {"run", "run.yaml"}
    assert len(list(root.glob(f"run/logs/job-{job}/attempt-0/node-0.log"))) == 1


def test_a_controller_that_is_away_while_a_rank_is_lost_is_waited_for(
    folder: Path, undisturbed: list[float], watch: WatchRun
) -> None:
    with training(folder, 1) as (nodes, job, log):
        with watch("Slurm", "controller away while a rank is killed"):
            nodes.run(0, "pkill", "-KILL", "slurmctld")
            signal_ranks(nodes, 1, "KILL")
            wait_until(lambda: "controller does not answer" in log.read_text(), START_SECONDS, log)
            quietly(SLURM, "controller", str(folder))
            finish(nodes, job, log)
    assert len(events(folder / "run", "restarted")) == 1
    check_losses(folder / "run", undisturbed)


def test_a_job_in_which_slurm_starts_no_more_steps_is_queued_again(
    folder: Path, undisturbed: list[float], watch: WatchRun
) -> None:
    """As after a restart of the controller, where the job had lost a node before."""
    with training(folder, 3, count=2, launch__spare_nodes=1, launch__min_nodes=2) as (nodes, job, log):
        with watch("Slurm", "node lost, then the controller restarted and a rank killed"):
            nodes.fault("lose", 2)
            wait_until(lambda: len(events(folder / "run", "restarted")) == 1, START_SECONDS, log)
            nodes.run(0, "pkill", "-KILL", "slurmctld")
            quietly(SLURM, "controller", str(folder))
            signal_ranks(nodes, 1, "KILL")
            nodes.fault("add", 2)
            quietly(SLURM, "node", str(folder), "2")
            finish(nodes, job, log)
        text = log.read_text()
    assert "Slurm, which starts no more steps in this job," in text or "Unable to create step" not in text
    check_losses(folder / "run", undisturbed)


@pytest.mark.parametrize("name", ["TERM", "USR1"])
def test_a_signal_to_the_launcher_alone_reaches_the_ranks_which_save(
    name: str, folder: Path, undisturbed: list[float], watch: WatchRun
) -> None:
    """As `--signal=B:TERM` sends it, `scancel --full`, and scripts of a site before maintenance."""
    with training(folder, 1) as (nodes, job, log):
        with watch("Slurm", f"SIG{name} to the batch script alone") as row:
            nodes.run(0, "scancel", "--batch", f"--signal={name}", job)
            wait_until(lambda: "is queued again" in log.read_text(), START_SECONDS, log)
            finish(nodes, job, log)
    assert row.steps_again == 0 and not events(folder / "run", "restarted"), "no attempt failed"
    check_losses(folder / "run", undisturbed)


def test_a_signal_in_an_allocation_of_salloc_ends_well_and_says_how_to_continue(folder: Path) -> None:
    """Slurm queues only batch jobs again."""
    write_run(folder, folder / "run")
    log = folder / "launch.log"
    with cluster(1, "slurm", folder=folder) as nodes:
        launcher = nodes.start(0, log, "salloc", "--nodes=1", "--ntasks-per-node=1", *launch_command(folder, 1))
        wait_for_steps(folder / "run", 3, log)
        nodes.run(0, "scancel", f"--signal={signal.SIGUSR1.name}", "1")
        end_well(launcher, log)
    assert "the same command continues it in another allocation" in log.read_text()
    last = metrics(folder / "run")[-1]["step"]
    assert (folder / f"run/checkpoints/step-{last:08d}/manifest.json").exists()


def test_a_rank_lost_beside_the_next_jobs_on_its_node_starts_again_at_a_port_of_its_own(
    folder: Path, undisturbed: list[float], watch: WatchRun
) -> None:
    """As in an array: job numbers follow each other, and restarts took the neighbours' ports."""
    runs = [folder, folder / "second", folder / "third"]
    for root in runs:
        write_run(folder, root / "run")
    with cluster(1, "slurm", folder=folder, options=("3", "6000")) as nodes:
        (_, log), *others = [submit(nodes, root, "launch.slurm.memory=1900") for root in runs]
        for root in runs:
            wait_for_steps(root / "run", 3, log)
        with watch("Slurm", "rank killed, the next two jobs on its node"):
            nodes.run(1, "pkill", "-KILL", "-f", f"{RANK}{folder}/run.yaml")
            for job, its_log in [("1", log), *others]:
                finish(nodes, job, its_log)
    assert len(events(folder / "run", "restarted")) == 1 and "EADDRINUSE" not in log.read_text()
    for root in runs:
        check_losses(root / "run", undisturbed)


def test_a_run_that_is_submitted_twice_has_one_job(folder: Path) -> None:
    """The second launcher, started where squeue did not know of the first, ends with the first one's name."""
    with training(folder, 2, count=1, steps=1, launch__heartbeat_seconds=900.0) as (nodes, job, _):
        signal_ranks(nodes, int(field(nodes, job, "BatchHost").removeprefix("node")), "STOP")  # it lasts
        refused = nodes.try_to(0, *launch_command(folder, 1))
        assert refused.returncode == 2 and f"job {job} (" in refused.stderr, refused.stderr
        nodes.run(0, "cp", str(folder / "run/launch/job.sbatch"), str(folder / "copy.sbatch"))
        second = nodes.run(0, "sbatch", "--parsable", str(folder / "copy.sbatch"))
        second_log = folder / f"run/logs/slurm-{second}.log"
        wait_until(lambda: state(nodes, second) in ("FAILED", "COMPLETED"), START_SECONDS, second_log)
        text = second_log.read_text()
        assert (state(nodes, second), field(nodes, second, "ExitCode")) == ("FAILED", "2:0"), text
        nodes.run(0, "scancel", job)
    assert "has another launcher (process" in text and f"job {job}" in text and "step 1/" not in text
