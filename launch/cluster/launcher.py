"""The launcher of a run: there is one, its options suit each other, and its job of Slurm may be queued again when it ends.

A second launcher would hold its nodes for as long as the first trains, and take that one's progress for its own. An option that
cannot take effect with the chosen launcher is rejected with its fix.

A job is queued again where a signal stopped the run, and steps are left. By the newest checkpoint and by the events that came
while this launcher ran, and not by the log of metrics, which others may rotate. A run that was told to stop at a step
(`train.stop_after_steps`) has ended.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

from amfm.data_pipeline.durable.files import take_lock, write_file_atomically
from amfm.launch.cluster.controller import ask, describe, name_job
from amfm.launch.cluster.slurm import Allocation
from amfm.launch.cluster.storage import StorageWait
from amfm.launch.console import say
from amfm.launch.follow_run import following
from amfm.pretrain.checkpoint.manifest_file import newest_saved_step
from amfm.pretrain.config.schema import RunConfig
from amfm.pretrain.launcher_protocol import DONE, last_word
from amfm.pretrain.monitor.held import holding
from amfm.pretrain.stages import resolve_stages


def check_options(
    on: str,
    *,
    nodes: int,
    hosts: Path | None,
    node_rank: int | None,
    master: str | None,
    address: str | None,
    dry_run: bool,
) -> None:
    """Reject options that cannot take effect with the chosen launcher. Raises ValueError with the fix."""
    given = {"--hosts": hosts, "--node-rank": node_rank, "--master": master}
    if on != "torchrun":
        for name, value in given.items():
            if value is not None:
                raise ValueError(f"{name} {value} belongs to --on torchrun; leave it out with --on {on}")
    if on != "ray" and address is not None:
        raise ValueError(f"--address {address} belongs to --on ray; leave it out with --on {on}")
    if hosts is not None and node_rank is not None:
        raise ValueError("--hosts starts every node and --node-rank only this one; give one of them")
    if node_rank is not None and node_rank >= nodes:
        raise ValueError(f"--node-rank {node_rank} must be less than --nodes {nodes}; count from 0")
    if on == "torchrun" and nodes > 1 and hosts is None and not dry_run and (node_rank is None or master is None):
        raise ValueError(
            f"--nodes {nodes} with torchrun needs --hosts FILE to start them all, or --node-rank and --master HOST[:PORT] "
            "to start this one; --dry-run prints the command of each node"
        )


def check_spares(spares: int, on: str, *, nodes: int, node_rank: int | None, form: str) -> None:
    """Reject spare nodes that cannot serve. Raises ValueError with the nearest number that works."""
    if spares > nodes:
        raise ValueError(f"launch.spare_nodes={spares} is more than --nodes {nodes}; lower it to {nodes} or less")
    if spares and on == "ray":
        raise ValueError(
            f"launch.spare_nodes={spares} with --on ray: every node of the Ray cluster beyond --nodes is a spare already; "
            "set it to 0"
        )
    if spares and on == "kubernetes" and form != "rayjob":
        raise ValueError(
            f"launch.spare_nodes={spares} with --form {form}: each node starts only itself; set it to 0, or use --form rayjob"
        )
    if spares and node_rank is not None:
        raise ValueError(
            f"launch.spare_nodes={spares} with --node-rank: each node starts only itself; set it to 0, or name the hosts with "
            "--hosts FILE"
        )


def check_kubernetes(on: str, form: str | None, *, dry_run: bool, doctor: bool) -> None:
    """Reject what cannot take effect with Kubernetes, or without. Raises ValueError with the fix."""
    if on != "kubernetes":
        if form is not None:
            raise ValueError(f"--form {form} belongs to --on kubernetes; leave it out with --on {on}")
        return
    if not dry_run:
        raise ValueError(
            "--on kubernetes submits nothing on its own; add --dry-run and give what it prints to kubectl apply -f -, or "
            "with --form skypilot to sky launch"
        )
    if doctor:
        raise ValueError("--doctor with --on kubernetes is not written; run amfm doctor --cluster in the pods")


LEAVING_SECONDS = 120.0  # for ranks of the launcher before, and locks of a host that is gone
POLL_SECONDS = 1.0


@contextmanager
def launching(config: RunConfig) -> Iterator[None]:
    """Inside the block only this process launches the run, as `only_launcher`.

    Where the run has a checkpoint its directory was good once, and storage that rejects is waited for.
    """
    run_dir = Path(config.run.dir)
    with ExitStack() as stack:

        def enter() -> None:
            stack.enter_context(only_launcher(run_dir))

        if newest_saved_step(run_dir) < 0:
            enter()
        else:
            StorageWait(run_dir, config.launch.storage_wait_seconds).until(enter)
        stack.enter_context(following(config))
        yield


@contextmanager
def only_launcher(run_dir: Path) -> Iterator[None]:
    """Inside the block only this process launches the run. Raises ValueError if another launcher or `amfm train` has it.

    On a file system that does not share locks between hosts, the ranks themselves refuse to train next to others.
    """
    folder = run_dir / "launch"
    folder.mkdir(parents=True, exist_ok=True)
    lock = wait_for_lock(folder / "launcher", f"{run_dir} has another launcher ({describe_launcher(folder)})")
    with lock:
        wait_for_lock(run_dir / "lock", f"another process trains in {run_dir}").close()
        facts = {"host": socket.gethostname(), "process": os.getpid(), "job": os.environ.get("SLURM_JOB_ID")}
        write_file_atomically(folder / "launcher.json", json.dumps(facts).encode() + b"\n")
        with holding(run_dir):
            yield


def wait_for_lock(path: Path, taken: str) -> IO[bytes]:
    """A lock, as soon as it is free. Raises ValueError when it is `taken` for LEAVING_SECONDS."""
    deadline = time.monotonic() + LEAVING_SECONDS
    is_said = False
    while (lock := take_lock(path, wait=False)) is None:
        if time.monotonic() > deadline:
            raise ValueError(f"{taken}; wait for it, end it, or give this run another run.dir")
        if not is_said:
            say(f"amfm launch: {taken}; waiting for its end, {LEAVING_SECONDS:.0f} s at most")
        is_said = True
        time.sleep(POLL_SECONDS)
    return lock


def describe_launcher(folder: Path) -> str:
    """Name the launcher that has a run, by what it wrote."""
    try:
        facts = json.loads((folder / "launcher.json").read_text(encoding="utf-8"))
        job = f", job {facts['job']}" if facts["job"] else ""
        return f"process {facts['process']} on {facts['host']}{job}"
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return "which has not written who it is"


def queue_rest(config: RunConfig, allocation: Allocation, code: int) -> int:
    """Queue the job again where a signal, or Slurm, stopped a run that has steps left; returns the launcher's exit code.

    code: of the attempts. Raises RuntimeError when Slurm rejects.
    """
    is_ending, word = allocation.is_ending(), last_word(Path(config.run.dir), allocation.num_events)
    is_finished = newest_saved_step(config.run.dir) >= resolve_stages(config)[-1].last_step
    # Ranks that the time limit's signal ended badly (while they loaded, or in a collective) continue in the next job too.
    is_stopped = is_ending or allocation.was_signalled or allocation.is_lost() or (code == DONE and word == "signal")
    if not config.launch.slurm.requeue or word == "end" or is_finished or not is_stopped:
        return code
    reason = "the job's time" if is_ending else "a signal"
    if allocation.is_lost():
        reason = "Slurm, which starts no more steps in this job,"
    fields = describe("job", name_job())
    if fields.get("BatchFlag") == "0":
        say(
            f"amfm launch: {reason} ended the run before its last step; the same command continues it in another allocation"
        )
        return code
    if fields.get("JobState") == "RUNNING":  # else Slurm has cancelled the job, or queued it itself
        say(f"amfm launch: {reason} ended the run before its last step; the job is queued again")
        ask("scontrol", "requeue", name_job())
    return code
