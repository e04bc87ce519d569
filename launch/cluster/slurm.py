"""Launch on Slurm: write and submit a batch script, and inside the allocation run one `srun` for each attempt.

How it works: the script only runs `amfm launch` again, which notices that it is inside an allocation and supervises
attempts there (`supervise.py`). So restarts within a job need no queueing, and Slurm's own requeue serves the time
limit: ranks are signalled before it, save and end well, and the job is queued again. One `srun` starts all ranks and,
with --kill-on-bad-exit, ends them when one fails; nodes that are down don't count for the next attempt.
"""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path

from launch.cluster.lines import sbatch_directive, sbatch_extra, shell_line, with_variables
from launch.cluster.supervise import Attempt, Outcome
from launch.rank_command import rank_command, source_variables
from pretrain.config.schema import RunConfig
from pretrain.launcher_protocol import BAD_INPUT, DONE, GOES_ON, RESTART_CAUSE, RUN_FAILED

FIRST_PORT, NUM_PORTS = 20_000, 12_000
# Each task takes its number as a rank from the variables that Slurm sets for it.
AS_RANK = 'export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID; exec "$@"'


def write_script(config: RunConfig, arguments: Sequence[str], *, nodes: int, ranks_per_node: int) -> str:
    """The text of the batch script: it runs `amfm launch` again, which finds itself inside the allocation.

    `arguments` is the `amfm launch` command line. Slurm signals the ranks before the time limit; they save and end, and
    the job is queued again until the run is finished. Raises ValueError for a setting that would become another line.
    """
    slurm = config.launch.slurm
    directives = {
        "job-name": ("run.name", config.run.name or Path(config.run.dir).name),
        "nodes": ("--nodes", nodes),
        "ntasks-per-node": ("--nproc-per-node", ranks_per_node),
        "gpus-per-node": ("launch.slurm.gpus", ranks_per_node if slurm.gpus else None),
        "cpus-per-task": ("launch.slurm.cpus_per_task", slurm.cpus_per_task),
        "partition": ("launch.slurm.partition", slurm.partition),
        "account": ("launch.slurm.account", slurm.account),
        "qos": ("launch.slurm.qos", slurm.qos),
        "time": ("launch.slurm.time_limit", slurm.time_limit),
        "signal": ("launch.slurm.signal_seconds", f"USR1@{slurm.signal_seconds}"),
        "open-mode": ("", "append"),
        "output": ("run.dir", log_file(config)),
    }
    lines = [sbatch_directive(name, value, key) for name, (key, value) in directives.items() if value is not None]
    lines += ["#SBATCH --requeue" if slurm.requeue else "#SBATCH --no-requeue", "#SBATCH --no-kill"]
    lines += [sbatch_extra(line) for line in slurm.extra]
    body = [shell_line([["cd", os.getcwd()]])]
    if config.launch.setup:
        body.append(config.launch.setup)
    body.append(shell_line([["exec", *with_variables(source_variables(), rank_command(arguments))]]))
    return "\n".join(["#!/bin/bash", *lines, "", "set -e", *body]) + "\n"


def log_file(config: RunConfig) -> str:
    """Path to which Slurm appends the output of all attempts of a job (`%j` is its number)."""
    return str((Path(config.run.dir) / "logs" / "slurm-%j.log").absolute())


def submit(config: RunConfig, script: str) -> str:
    """Write the script into the run directory, submit it with sbatch and return sbatch's answer.

    Raises RuntimeError when there is no sbatch here or it refuses the script.
    """
    path = Path(config.run.dir) / "launch" / "job.sbatch"
    path.parent.mkdir(parents=True, exist_ok=True)
    Path(log_file(config)).parent.mkdir(parents=True, exist_ok=True)
    path.touch(mode=0o600)  # launch.setup is in it, and may hold secrets
    path.chmod(0o600)
    path.write_text(script, encoding="utf-8")
    try:
        done = subprocess.run(["sbatch", str(path)], capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise RuntimeError(
            f"sbatch is not on this machine; run this on a login node of the cluster, or submit {path} there"
        ) from error
    if done.returncode:
        raise RuntimeError(f"sbatch refused {path}: {done.stderr.strip()}")
    return done.stdout.strip()


def is_inside_allocation() -> bool:
    """Whether this process runs inside an allocation of sbatch or salloc, which then takes the ranks."""
    return "SLURM_JOB_ID" in os.environ


class Allocation:
    """Nodes that Slurm gave to this job; one `srun` starts all ranks of an attempt on them."""

    def __init__(self, config: RunConfig, arguments: Sequence[str], *, ranks_per_node: int) -> None:
        self.config, self.arguments, self.ranks_per_node = config, list(arguments), ranks_per_node
        self.job = os.environ["SLURM_JOB_ID"]

    def command(self, nodes: int) -> list[str]:
        """The srun command line for an attempt on `nodes` nodes."""
        slurm = self.config.launch.slurm
        container = [f"--container-image={slurm.container_image}"] if slurm.container_image else []
        if slurm.container_mounts:
            container.append(f"--container-mounts={slurm.container_mounts}")
        return [
            "srun",
            f"--nodes={nodes}",
            f"--ntasks={nodes * self.ranks_per_node}",
            f"--ntasks-per-node={self.ranks_per_node}",
            "--kill-on-bad-exit=1",
            *container,
            *("bash", "-c", AS_RANK, "rank"),
            *rank_command(self.arguments),
        ]

    def environment(self, attempt: Attempt) -> dict[str, str]:
        """Environment of an attempt: ranks meet on the first node, at a port derived from job and attempt.

        A new port for each attempt, as ranks of the last one may still hold theirs.
        """
        number = int(self.job) + attempt.number
        variables = {
            "WORLD_SIZE": str(attempt.nodes * self.ranks_per_node),
            "LOCAL_WORLD_SIZE": str(self.ranks_per_node),
            GOES_ON: "1",
            "MASTER_ADDR": address_of(self.hosts()[0]),
            "MASTER_PORT": str(FIRST_PORT + number % NUM_PORTS),
        }
        if attempt.cause:
            variables[RESTART_CAUSE] = attempt.cause
        return os.environ | source_variables() | variables

    def hosts(self) -> list[str]:
        """Names of allocated nodes that are up, in Slurm's order."""
        listed = os.environ["SLURM_JOB_NODELIST"]
        names = ask("scontrol", "show", "hostnames", listed).split()
        down = set(ask("sinfo", "-h", "-N", "-n", listed, "-t", "down,fail,drain", "-o", "%N").split())
        return [name for name in names if name not in down]

    def usable_nodes(self) -> int:
        """Number of allocated nodes that are up."""
        return len(self.hosts())

    def start(self, attempt: Attempt) -> Outcome:
        """Run one attempt to its end; its output passes through.

        The first amfm message in it becomes the cause of a failure, else srun's first error. Slurm stops all ranks when
        one fails.
        """
        message = srun_error = ""
        with subprocess.Popen(
            self.command(attempt.nodes), env=self.environment(attempt), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        ) as process:
            assert process.stdout is not None, "started with a pipe"
            for raw in process.stdout:
                line = raw.decode(errors="replace").rstrip("\n")
                if "amfm: " in line:
                    message = message or line
                elif line.startswith("srun: error"):
                    srun_error = srun_error or line
                print(line, flush=True)
        code = process.returncode
        if code in (DONE, BAD_INPUT):
            return Outcome(code)
        return Outcome(RUN_FAILED, message or srun_error or f"srun ended with code {code}")

    def queue_again(self) -> None:
        """Requeue the job, after a signal ended the ranks in good order before the run was finished."""
        ask("scontrol", "requeue", self.job)


def address_of(node: str) -> str:
    """Address at which Slurm reaches a node; on some clusters it is not the node's name."""
    fields = dict(field.partition("=")[::2] for field in ask("scontrol", "-o", "show", "node", node).split())
    return fields.get("NodeAddr", node)


def ask(*command: str) -> str:
    """Standard output of one of Slurm's programs. Raises RuntimeError with its error text when it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)} failed: {done.stderr.strip()}")
    return done.stdout
