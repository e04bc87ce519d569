"""Launch on Slurm: write and submit a batch script, and inside the allocation run one `srun` for each attempt.

How it works: the script only runs `amfm launch` again, which notices that it is inside an allocation and supervises
attempts there (`supervise.py`). So restarts within a job need no queueing, and Slurm's own requeue serves the time
limit: ranks are signalled before it, save and end well, and the job is queued again. One `srun` starts all ranks and,
with --kill-on-bad-exit, ends them when one fails. Before each attempt another `srun` checks every node of the job that is up
(node_check.py), `launch.spare_nodes` among them, and the first that pass get the ranks. The ranks of each node write a log,
because the lines of a thousand ranks in one file tell nothing; rank 0's lines are shown in the job's log.

In a container (pyxis) the ranks run the image's Python in the same working directory, which must be mounted.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from amfm.launch.cluster.child import ending_with_us
from amfm.launch.cluster.controller import AWAY, BatchHostWatch, address_of, ask
from amfm.launch.cluster.lines import (
    check_variables,
    plain,
    sbatch_directive,
    sbatch_extra,
    shell_line,
    with_variables,
)
from amfm.launch.cluster.links import candidates
from amfm.launch.cluster.node_check import ExcludedNodes, blame, make_request, read_answers
from amfm.launch.cluster.node_logs import NO_STEP, SIGNALLED, Follower, SrunOutput, first_message, node_log
from amfm.launch.cluster.storage import list_inputs
from amfm.launch.cluster.supervise import Attempt, Outcome, forward_to_ranks
from amfm.launch.console import say
from amfm.launch.rank_command import isolated_python, rank_command
from amfm.pretrain.config.schema import RunConfig
from amfm.pretrain.launcher_protocol import BAD_INPUT, DONE, GOES_ON, RESTART_CAUSE, RUN_FAILED, read_events

POLL_SECONDS = 0.5
CHECK_SECONDS = 120.0
MAX_REFUSED = 6  # steps in a row, REFUSED_SECONDS apart
REFUSED_SECONDS = 5.0
START_SECONDS = 120  # loading and a first step: an attempt that has less before its signal would save nothing new
# Each task takes its number as a rank from the variables that Slurm sets for it.
AS_RANK = 'export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID; exec "$@"'


def write_script(
    config: RunConfig, arguments: Sequence[str], rank_arguments: Sequence[str], *, nodes: int, ranks_per_node: int
) -> str:
    """The text of the batch script: it runs `amfm launch` again, which finds itself inside the allocation.

    `arguments` is the `amfm launch` command line, `rank_arguments` that of the ranks, whose srun line stands in the script
    as a warning. Slurm signals the ranks before the time limit; they save and end, and
    the job is queued again until the run is finished. Raises ValueError for a setting that would become another line.
    """
    slurm = config.launch.slurm
    directives = {
        "job-name": ("run.name", config.run.name or Path(config.run.dir).name),
        "nodes": ("--nodes and launch.spare_nodes", nodes + config.launch.spare_nodes),
        "ntasks-per-node": ("--nproc-per-node", ranks_per_node),
        "gpus-per-node": ("launch.slurm.gpus", ranks_per_node if slurm.gpus else None),
        "mem": ("launch.slurm.memory", slurm.memory),
        "cpus-per-task": ("launch.slurm.cpus_per_task", slurm.cpus_per_task),
        "partition": ("launch.slurm.partition", slurm.partition),
        "account": ("launch.slurm.account", slurm.account),
        "qos": ("launch.slurm.qos", slurm.qos),
        "time": ("launch.slurm.time_limit", slurm.time_limit),
        "signal": ("launch.slurm.signal_seconds", f"USR1@{slurm.signal_seconds}"),
        "open-mode": ("", "append"),
        "output": ("run.dir", str(log_file(config, "%j"))),
    }
    lines = [sbatch_directive(name, value, key) for name, (key, value) in directives.items() if value is not None]
    lines += ["#SBATCH --requeue" if slurm.requeue else "#SBATCH --no-requeue", "#SBATCH --no-kill"]
    lines += [sbatch_extra(line) for line in slurm.extra]
    body = [shell_line([["cd", os.getcwd()]])]
    if slurm.modules:
        body.append(shell_line([["module", "load", *(plain(name, "launch.slurm.modules") for name in slurm.modules)]]))
    if config.launch.setup:
        body.append(config.launch.setup)
    body.append(shell_line([["exec", *rank_command(arguments)]]))
    variables = check_variables(config.launch.environment)
    log = node_log(config.run.dir, 0, "%n", job="JOB").absolute()
    srun = shlex.join(with_variables(variables, srun_command(config, rank_arguments, log, nodes, ranks_per_node)))
    remark = ["# The last line starts, for each attempt with its own number in the name of the logs:", f"#   {srun}"]
    return "\n".join(["#!/bin/bash", *lines, "", *remark, "set -e", *body]) + "\n"


def log_file(config: RunConfig, job: str) -> Path:
    """Path to which Slurm appends the output of all attempts of a job, as Slurm reads it: `%j` is the job's number."""
    folder = (Path(config.run.dir) / "logs").absolute()
    return Path(str(folder).replace("%", "%%"), f"slurm-{job}.log")


def submit(config: RunConfig, script: str, name: str) -> str:
    """Write the script into the run directory under a name, submit it with sbatch and return sbatch's answer.

    Raises RuntimeError when there is no sbatch here or it rejects the script.
    """
    path = (Path(config.run.dir) / "launch" / f"{name}.sbatch").absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    Path(config.run.dir, "logs").mkdir(exist_ok=True)
    path.unlink(missing_ok=True)  # whatever it is: a link is not followed
    # launch.setup is in it, and may hold secrets.
    with open(path, "x", encoding="utf-8", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
        file.write(script)
    try:
        if not any(line.startswith(("--dependency", "-d")) for line in config.launch.slurm.extra):
            refuse_second(path)
        done = subprocess.run(["sbatch", str(path)], capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise RuntimeError(
            f"sbatch is not on this machine; run this on a login node of the cluster, or submit {path} there; without Slurm: "
            "--on torchrun --hosts FILE"
        ) from error
    if done.returncode:
        raise RuntimeError(f"sbatch rejected {path}: {done.stderr.strip()}")
    return done.stdout.strip()


def refuse_second(script: Path) -> None:
    """Raise ValueError if a job of this user has the script already; says nothing if Slurm does not answer, as sbatch will."""
    command = ["squeue", "--me", "--noheader", "--format=%i %T %o"]
    listed = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    for job, state, path in (words for line in listed.splitlines() if len(words := line.split(maxsplit=2)) == 3):
        if path.strip() == str(script):
            raise ValueError(
                f"job {job} ({state.lower()}) has this run already; end it with scancel {job}, or queue behind it with "
                f"launch.slurm.extra=['--dependency=afterany:{job}']"
            )


def is_inside_allocation() -> bool:
    """Whether this process runs inside an allocation of sbatch or salloc, which then takes the ranks."""
    return "SLURM_JOB_ID" in os.environ


def srun_command(
    config: RunConfig,
    arguments: Sequence[str],
    log: Path,
    nodes: int,
    ranks_per_node: int,
    names: Sequence[str] = (),
) -> list[str]:
    """The srun command line of an attempt on `nodes` nodes, these by name where names are given; `log`: of a node, by its `%n`.

    srun does not take the cores a task from the job (since Slurm 22.05), so they are said again. `%n` in the name of the
    logs is the node's number. The job's --export=NONE is srun's default too, and would take all variables from the ranks.
    """
    slurm = config.launch.slurm
    words = [
        "srun",
        f"--nodes={nodes}",
        *([f"--nodelist={','.join(names)}"] if names else []),
        f"--ntasks={nodes * ranks_per_node}",
        f"--ntasks-per-node={ranks_per_node}",
        *([f"--cpus-per-task={slurm.cpus_per_task}"] if slurm.cpus_per_task else []),
        *([f"--cpu-bind={slurm.cpu_bind}"] if slurm.cpu_bind else []),
        "--export=ALL",
        "--kill-on-bad-exit=1",
        "--label",
        f"--output={str(log.parent).replace('%', '%%')}/{log.name}",
        "--open-mode=append",
    ]
    container, command = in_container(config, rank_command(arguments))
    return [*words, *container, "bash", "-c", AS_RANK, "rank", *command]


def in_container(config: RunConfig, command: list[str]) -> tuple[list[str], list[str]]:
    """Options of srun for the container, if there is one, and the command with the image's Python."""
    slurm, words = config.launch.slurm, []
    if slurm.container_image:
        words += [f"--container-image={slurm.container_image}", f"--container-workdir={os.getcwd()}"]
        command = [slurm.container_python, *command[1:]]
    if slurm.container_mounts:
        words.append(f"--container-mounts={slurm.container_mounts}")
    return words, command


class Allocation:
    """Nodes that Slurm gave to this job; one `srun` starts all ranks of an attempt on them."""

    def __init__(self, config: RunConfig, arguments: Sequence[str], *, ranks_per_node: int) -> None:
        self.config, self.arguments, self.ranks_per_node = config, list(arguments), ranks_per_node
        self.job = os.environ["SLURM_JOB_ID"]
        self.variables = check_variables(config.launch.environment)
        self.excluded = ExcludedNodes(Path(config.run.dir))
        self.checked: list[str] = []  # for the attempt to come
        self.ports: dict[str, int] = {}  # free ones, by node
        self.running: list[str] = []
        self.srun: subprocess.Popen[bytes] | None = None
        self.was_signalled = False
        self.refused = 0  # steps in a row that Slurm did not start
        self.num_events = sum(1 for _ in read_events(Path(config.run.dir)))  # before this launcher
        self.watch = BatchHostWatch(Path(config.run.dir), requeue=config.launch.slurm.requeue)
        self.cause = self.watch.take_cause()  # of the first attempt
        if self.cause:
            say(f"amfm launch: {self.cause}; continuing in the job that was queued again")

    def environment(self, attempt: Attempt) -> dict[str, str]:
        """Environment of an attempt: ranks meet on the first node, at the port that its check found free."""
        first = (self.checked or self.hosts())[0]
        variables = {
            "WORLD_SIZE": str(attempt.nodes * self.ranks_per_node),
            "LOCAL_WORLD_SIZE": str(self.ranks_per_node),
            GOES_ON: "1",
            "MASTER_ADDR": address_of(first),
            "MASTER_PORT": str(self.ports.get(first) or candidates(f"{self.job}, attempt {attempt.number}")[0]),
        }
        cause, self.cause = attempt.cause or self.cause, None
        if cause:
            variables[RESTART_CAUSE] = cause
        return os.environ | self.variables | variables

    def hosts(self) -> list[str]:
        """Names of allocated nodes that are up, in Slurm's order."""
        listed = os.environ["SLURM_JOB_NODELIST"]
        names = ask("scontrol", "show", "hostnames", listed).split()
        down = set(ask("sinfo", "-h", "-N", "-n", listed, "-t", "down,fail,drain", "-o", "%N").split())
        return [name for name in names if name not in down]

    def usable_nodes(self) -> int:
        """Number of allocated nodes that are up and pass the check for the attempt to come, spares among them."""
        up = [name for name in self.hosts() if name not in self.excluded.reasons]
        self.watch.keep(up)
        for name in self.running:
            if name not in up and name not in self.excluded.reasons:
                self.excluded.lose(name)
        self.running = []
        if not up or set(up) == set(self.checked):
            return len(up)
        faults, self.ports = check_nodes(self.config, up, self.ranks_per_node, os.environ | self.variables, self.job)
        for name, texts in faults.items():
            if texts:
                self.excluded.exclude(name, "; ".join(texts))
        # If no node answered, srun itself was stopped, by a signal for instance: that says nothing of any node.
        self.checked = [name for name in up if faults.get(name) == []] if faults else up
        return len(self.checked)

    def start(self, attempt: Attempt) -> Outcome:
        """Run one attempt to its end, showing rank 0's log and what srun says; signals to the launcher go to the ranks.

        Cause of a failure: the first amfm message of srun's output, of the rank that srun names, or of any rank; else
        srun's first error. Slurm stops all ranks when one fails.
        """
        with forward_to_ranks(self._forward) as interrupt:
            if self.was_signalled:  # before there were ranks
                return interrupt.outcome(Outcome(DONE, began=False))
            if attempt.number and self.is_ending():
                say("amfm launch: remaining job time is too short to restart")
                return Outcome(DONE, began=False)
            return interrupt.outcome(self._run_ranks(attempt))

    def _log(self, attempt: Attempt, node: int | str) -> Path:
        """The log of a node: in a folder of this job, and of this start of it."""
        starts = os.environ.get("SLURM_RESTART_COUNT", "0")
        job = self.job if starts == "0" else f"{self.job}-restart-{starts}"
        return node_log(self.config.run.dir, attempt.number, node, job=job).absolute()

    def _forward(self, number: int) -> None:
        """Let the ranks save and end: srun hands them SIGUSR1, and would kill them on SIGTERM."""
        self.was_signalled = True
        if self.srun is not None and self.srun.poll() is None:
            self.srun.send_signal(signal.SIGUSR1)

    def _run_ranks(self, attempt: Attempt) -> Outcome:
        """Run srun to its end and say how that was."""
        num_ranks = attempt.nodes * self.ranks_per_node
        logs = [self._log(attempt, node) for node in range(attempt.nodes)]
        logs[0].parent.mkdir(parents=True, exist_ok=True)
        sizes = [log.stat().st_size if log.exists() else 0 for log in logs]
        shown, said = Follower(logs[0]), SrunOutput()
        environment, self.running = self.environment(attempt), self.checked[: attempt.nodes]
        self.checked = []
        command = srun_command(
            self.config, self.arguments, self._log(attempt, "%n"), attempt.nodes, self.ranks_per_node, self.running
        )
        with subprocess.Popen(
            ending_with_us(command),
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        ) as process:
            self.srun = process
            reader = threading.Thread(target=said.follow, args=(process.stdout,), daemon=True)
            reader.start()
            while process.poll() is None:
                shown.show()
                with suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=POLL_SECONDS)
            reader.join()
        shown.show()
        code = process.returncode
        if code in (DONE, BAD_INPUT):
            return Outcome(code)
        if SIGNALLED in said.error:  # before the rank's first line, which notes it
            self.was_signalled = True
            return Outcome(DONE, began=False)
        if NO_STEP in said.error:
            return self._without_step(said.error)
        self.refused = 0
        named = [said.failed_task] if said.failed_task is not None and said.failed_task < num_ranks else []
        places = [(rank // self.ranks_per_node, rank) for rank in named] + [
            (node, None) for node in range(attempt.nodes)
        ]
        words = (first_message(logs[node], rank=rank, start=sizes[node]) for node, rank in places)
        message = said.message or next((text for text in words if text), "")
        cause = message or said.error or f"srun ended with code {code}"
        # Where srun did not reach the controller, there were no ranks.
        return Outcome(RUN_FAILED, cause, began=bool(message) or not AWAY.search(said.error))

    def _without_step(self, error: str) -> Outcome:
        """Slurm starts no step, as in a job that lost nodes once its controller was started again: another job may.

        The outcome of an attempt without ranks, which is tried again; at last the end of this job, which is queued again.
        """
        self.refused += 1
        time.sleep(REFUSED_SECONDS)
        if self.is_lost() and self.config.launch.slurm.requeue:
            return Outcome(DONE, began=False)
        return Outcome(RUN_FAILED, error, began=self.is_lost())

    def is_lost(self) -> bool:
        """Whether Slurm starts no more steps in this job."""
        return self.refused >= MAX_REFUSED

    def is_ending(self) -> bool:
        """Whether the job is so near its time limit that ranks were told to stop, or would be before a first step.

        Slurm signals once: ranks that start after it would be killed at the limit, and a job so ended is not queued again.
        """
        ends = os.environ.get("SLURM_JOB_END_TIME")
        slurm = self.config.launch.slurm
        return slurm.requeue and ends is not None and int(ends) - time.time() < slurm.signal_seconds + START_SECONDS


def check_nodes(
    config: RunConfig, names: Sequence[str], ranks_per_node: int, environment: Mapping[str, str], job: str
) -> tuple[dict[str, list[str]], dict[str, int]]:
    """What is wrong with each of these nodes of the job, by name, nothing for an empty list, and a free port of each.

    Who does not answer is missing.
    """
    ports = candidates(f"check of {job}")
    link = {"ports": ports, "connect": [address_of(names[0]), ports], "expect": len(names) - 1}
    inputs = list_inputs(config)
    request = make_request(Path(config.run.dir), ranks_per_node, inputs=inputs, reloads=True) | {"link": link}
    module = [*isolated_python(), "-m", "amfm.launch.cluster.node_check", json.dumps(request)]
    container, command = in_container(config, module)
    count = len(names)
    srun = [
        "srun",
        "--export=ALL",
        f"--nodes={count}",
        f"--nodelist={','.join(names)}",
        f"--ntasks={count}",
        "--ntasks-per-node=1",
    ]
    try:
        done = subprocess.run(
            ending_with_us([*srun, "--kill-on-bad-exit=0", "--no-kill", *container, *command]),
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
            check=False,
            timeout=CHECK_SECONDS,
        )
        said = done.stdout
    except subprocess.TimeoutExpired as error:
        said = error.stdout.decode(errors="replace") if isinstance(error.stdout, bytes) else error.stdout or ""
    answers = [answer for answer in read_answers(said) if "faults" in answer]
    faults = blame({answer["node"]: answer["faults"] for answer in answers}, names[0], Path(config.run.dir))
    return faults, {answer["node"]: answer["port"] for answer in answers}
