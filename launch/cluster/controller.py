"""Slurm's controller, asked and ordered: it may be away for minutes (an upgrade, a failover), which ranks outlive.

A watch over the host of the batch script, by other nodes of the job: Slurm supervises nothing there.

How it works: a batch job keeps running when a node is lost (`--no-kill`), and its launcher continues on the others. When the
launcher's own node is lost, Slurm ends the ranks, takes the node from the job's list, and leaves the job running with nothing
in it until its time limit. So a step on other nodes compares that list with the batch host, and puts the job back into the
queue. It is a shell, not Python, and shares the cores of the ranks.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from amfm.launch.cluster.child import ending_with_us
from amfm.launch.console import say
from amfm.pretrain.monitor.held import extend_held

AWAY_SECONDS = 1800.0
PAUSE_SECONDS = 5.0
AWAY = re.compile(
    "contact slurm controller|Socket timed out|Zero Bytes were transmitted|Connection refused", re.IGNORECASE
)


def ask(*command: str) -> str:
    """Standard output of one of Slurm's programs; one that does not reach the controller is run again, for half an hour.

    Raises RuntimeError with its error text when it fails.
    """
    deadline, is_said = time.monotonic() + AWAY_SECONDS, False
    while True:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if not done.returncode:
            return done.stdout
        if not AWAY.search(done.stderr) or time.monotonic() > deadline:
            raise RuntimeError(f"{shlex.join(command)} failed: {done.stderr.strip()}")
        if not is_said:
            say(
                f"amfm launch: Slurm's controller does not answer ({done.stderr.strip()}); asking every {PAUSE_SECONDS:.0f} s"
            )
        is_said = True
        time.sleep(PAUSE_SECONDS)


def describe(kind: str, name: str) -> dict[str, str]:
    """What the controller knows of a job or a node, by name of the field."""
    return dict(word.partition("=")[::2] for word in ask("scontrol", "-o", "show", kind, name).split())


def address_of(node: str) -> str:
    """Address at which Slurm reaches a node; on some clusters it is not the node's name."""
    return describe("node", node).get("NodeAddr", node)


def name_job() -> str:
    """This job's number; for one of an array with the array's, as one of them has the array's own number, which stands for all."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ["SLURM_JOB_ID"]


LOOK_SECONDS = 30
NUM_WATCHERS = 3  # one may be lost together with the batch host
STOP_SECONDS = 10.0
# $1: job, $2: batch host, $3: seconds between looks, $4: where the cause is left, then what ends the job. USR1 is for the ranks.
LOOKING = """trap '' USR1
while sleep "$3"; do
  nodes=$(squeue --noheader --jobs="$1" --format=%N) && nodes=$(scontrol show hostnames "$nodes") && [ "$nodes" ] || continue
  printf '%s\\n' "$nodes" | grep -qxF "$2" && continue
  printf 'the batch host %s was lost, and the launcher with it\\n' "$2" >"$4"
  "$5" $6 "$1"
done"""


class BatchHostWatch:
    """Watches this process's host from other nodes of its batch job; does nothing in an allocation of salloc.

    requeue: whether a job that lost its launcher is queued again; else it is cancelled, which frees its nodes.
    """

    def __init__(self, run_dir: Path, *, requeue: bool) -> None:
        self.host = os.environ.get("SLURMD_NODENAME", "")
        self.is_batch = bool(self.host) and describe("job", name_job()).get("BatchFlag") == "1"
        self.note = run_dir.absolute() / "launch" / "lost_batch_host"
        self.end = ["scontrol", "requeue"] if requeue else ["scancel", ""]
        self.step: subprocess.Popen[bytes] | None = None

    def take_cause(self) -> str | None:
        """Why the job before this one ended without a word of its launcher, once; None if it did not."""
        try:
            cause = self.note.read_text(encoding="utf-8").strip()
        except FileNotFoundError:
            return None
        extend_held(self.note.parents[1], self.note.stat().st_mtime)  # until someone noticed, the other nodes were
        with suppress(OSError):  # read-only storage, which the launch waits for
            self.note.unlink()
        return cause

    def keep(self, nodes: Sequence[str]) -> None:
        """Start the watch on some of these nodes, or start it again where its nodes are gone."""
        others = [node for node in nodes if node != self.host][:NUM_WATCHERS]
        if not self.is_batch or not others or (self.step is not None and self.step.poll() is None):
            return
        self.note.parent.mkdir(parents=True, exist_ok=True)
        srun = ["srun", "--overlap", "--no-kill", "--kill-on-bad-exit=0", "--export=ALL", "--mem=0", "--quiet"]
        place = [
            f"--nodes={len(others)}",
            f"--nodelist={','.join(others)}",
            f"--ntasks={len(others)}",
            "--ntasks-per-node=1",
        ]
        words = [name_job(), self.host, str(LOOK_SECONDS), str(self.note), *self.end]
        self.step = subprocess.Popen(
            ending_with_us([*srun, *place, "--cpus-per-task=1", "sh", "-c", LOOKING, "watch", *words]),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def close(self) -> None:
        """End the watch."""
        if self.step is not None:
            self.step.terminate()
            with suppress(subprocess.TimeoutExpired):
                self.step.wait(STOP_SECONDS)
