"""Launch with torchrun: the command of each node, run here, or on every host of a list through a remote shell.

How it works: `run_here` starts the torchrun of one node of several, for clusters that start one command a node; torchrun
then does the restarts. With a list of hosts, each gets one shell line over ssh that notes its process number, runs
`launch.setup` and becomes torchrun; its output is followed for the cause of a failure, and `supervise.py` restarts all
hosts together. A run on this machine alone is such a list of one host, behind a shell of this machine. Signals go to the
ranks below torchrun, which save and end well, where torchrun would kill them after a while. When the launcher is killed,
what it started ends too, and ranks end with their torchrun.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from amfm.launch.cluster.interrupt import forward_to_ranks
from amfm.launch.cluster.lines import check_host, remote_command, shell_line, with_variables
from amfm.launch.cluster.local import forward_signals
from amfm.launch.cluster.orphans import ending_with_us
from amfm.launch.cluster.rank_logs import find_message, is_telling
from amfm.launch.cluster.supervise import Attempt, Outcome
from amfm.pretrain.launcher_protocol import BAD_INPUT, DONE, GOES_ON, LAUNCHER_PID, RESTART_CAUSE, RUN_FAILED

GRACE_SECONDS = 10.0  # for the other hosts to end by themselves after one failed
TORCHRUN_STOP_SECONDS = 45.0  # torchrun gives its ranks 30 s after a signal, then kills them
ANSWER_SECONDS = 10.0
HERE = ("sh", "-c", 'exec sh -c "$1"')  # in the place of a remote shell, for the host that we are on
KEPT_LINES = 60  # torchrun ends with a report of this length


@dataclass(frozen=True)
class NodeCommand:
    """Command of one node: its share of the ranks of `arguments` (an `amfm` command line)."""

    arguments: Sequence[str]
    nodes: int
    ranks_per_node: int
    node_rank: int
    master: str
    port: int
    setup: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    python: str = sys.executable

    def torchrun(self, *, max_restarts: int) -> list[str]:
        """The torchrun command line; torchrun sets rank variables and stops the node's ranks when one fails.

        Raises ValueError for a master that is no host name.
        """
        check_host(self.master, "--master")
        return [
            self.python,
            *("-P", "-m", "torch.distributed.run"),
            f"--nnodes={self.nodes}",
            f"--nproc-per-node={self.ranks_per_node}",
            f"--node-rank={self.node_rank}",
            f"--master-addr={self.master}",
            f"--master-port={self.port}",
            f"--max-restarts={max_restarts}",
            # As a program: torchrun's own way to start Python would look into the working directory.
            *("--no-python", self.python, "-P", "-m", "amfm.launch"),
            *self.arguments,
        ]

    def shell_line(self, *, directory: str, pid_file: str, cause: str | None) -> str:
        """One line for another host's shell: change directory, note the process number, run setup, become torchrun.

        `exec` keeps the noted number: it is then torchrun's own, whose children are the ranks to signal, and which end with
        it.
        """
        variables = (
            dict(self.environment)
            | ({RESTART_CAUSE: " ".join(cause.split())} if cause else {})
            | {GOES_ON: "1"}
            # `ssh -tt` gives ranks a terminal, but their lines go into the launcher's output: no panel that is redrawn.
            | {"TERM": "dumb"}
        )
        return shell_line(
            [
                ["cd", directory],
                f"echo $$ > {shlex.quote(pid_file)}",
                *([self.setup] if self.setup else []),
                f"exec env {LAUNCHER_PID}=$$ {shlex.join(with_variables(variables, self.torchrun(max_restarts=0)))}",
            ]
        )


def read_hosts(path: Path) -> list[str]:
    """Hosts of a file, one a line; `#` begins a comment.

    Raises ValueError for an empty file, for a host named twice, and for a line that is no host name.
    """
    lines = [line.partition("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines()]
    hosts = [line for line in lines if line]
    if not hosts:
        raise ValueError(f"{path} names no host; write one host a line")
    twice = {host for host in hosts if hosts.count(host) > 1}
    if twice:
        raise ValueError(f"{path} names {', '.join(sorted(twice))} more than once; one line a host")
    return [check_host(host, str(path)) for host in hosts]


def run_here(command: NodeCommand, *, max_restarts: int) -> int:
    """Run this node's torchrun and return the exit code; torchrun itself restarts its ranks."""
    process = subprocess.Popen(
        ending_with_us(command.torchrun(max_restarts=max_restarts)),
        env=os.environ | dict(command.environment),
    )
    with forward_signals(lambda number: signal_children(process.pid, number)):
        code = process.wait()
    return RUN_FAILED if code else DONE


def signal_children(pid: int, number: int) -> None:
    """Signal the ranks below a torchrun: they save and end well, where torchrun would kill them after a while."""
    subprocess.run(["pkill", f"-{number}", "-P", str(pid)], check=False)


@dataclass
class HostRun:
    """One host's torchrun behind a remote shell; keeps amfm's first message and the last lines of output.

    is_named: whether its lines are shown with the host in front.
    """

    host: str
    process: subprocess.Popen[bytes]
    is_named: bool = True
    message: str = ""
    lines: deque[str] = field(default_factory=lambda: deque(maxlen=KEPT_LINES))
    reader: threading.Thread | None = None

    def follow(self) -> None:
        """Copy the output to standard error with the host in front, keeping message and last lines."""
        assert self.process.stdout is not None, "started with a pipe"
        for raw in self.process.stdout:
            line = raw.decode(errors="replace").rstrip("\r\n")
            self.lines.append(line)
            self.message = self.message or find_message(line)
            sys.stderr.write(f"{self.host}: {line}\n" if self.is_named else f"{line}\n")
            sys.stderr.flush()

    def stop(self, number: int) -> None:
        """Signal the remote shell's process group here; when ssh ends, the far side hangs up.

        That ends torchrun and its ranks there.
        """
        if self.process.poll() is None:
            os.killpg(self.process.pid, number)


class RemoteHosts:
    """Runs attempts on a list of hosts, each through `[*remote_shell, host, line]`, one attempt at a time."""

    def __init__(
        self,
        arguments: Sequence[str],
        hosts: Sequence[str],
        *,
        ranks_per_node: int,
        port: int,
        run_dir: str,
        setup: str | None,
        remote_shell: Sequence[str],
        environment: Mapping[str, str] = {},
    ) -> None:
        self.arguments, self.hosts, self.ranks_per_node, self.port = arguments, list(hosts), ranks_per_node, port
        self.run_dir, self.setup, self.remote_shell = run_dir, setup, list(remote_shell)
        self.environment = environment
        self.usable = list(hosts)
        self.runs: list[HostRun] = []

    def commands(self, attempt: Attempt) -> list[list[str]]:
        """Command line of each host for one attempt, in node order; the first host is the master."""
        hosts = self.usable[: attempt.nodes]
        lines = [
            NodeCommand(
                # Another port each time: ranks of the last attempt may still hold theirs.
                *(self.arguments, len(hosts), self.ranks_per_node, node_rank, hosts[0], self.port + attempt.number),
                setup=self.setup,
                environment=self.environment,
            ).shell_line(directory=os.getcwd(), pid_file=self.pid_file(node_rank), cause=attempt.cause)
            for node_rank in range(len(hosts))
        ]
        return [remote_command(self.remote_shell, host, line) for host, line in zip(hosts, lines)]

    def pid_file(self, node_rank: int) -> str:
        """File in which a node notes its torchrun's process number; in the run directory, which all nodes share."""
        return str(Path(self.run_dir) / "launch" / f"node-{node_rank}.pid")

    def start(self, attempt: Attempt) -> Outcome:
        """Run one attempt on all hosts to its end; the first host that fails ends it for all."""
        Path(self.pid_file(0)).parent.mkdir(parents=True, exist_ok=True)
        self.runs = []
        for host, command in zip(self.usable, self.commands(attempt)):
            process = subprocess.Popen(
                ending_with_us(command),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            run = HostRun(host, process, is_named=tuple(self.remote_shell) != HERE)
            run.reader = threading.Thread(target=run.follow, daemon=True)
            run.reader.start()
            self.runs.append(run)
        with forward_to_ranks(self._forward) as interrupt:
            ended = self._wait()
        return interrupt.outcome(ended)

    def usable_nodes(self) -> int:
        """Number of hosts that answer now; the next attempt uses these."""
        self.usable = [host for host in self.hosts if self._answers(host)]
        return len(self.usable)

    def _answers(self, host: str) -> bool:
        """Whether a host runs `true` through the remote shell within `ANSWER_SECONDS`."""
        try:
            done = subprocess.run(
                remote_command(self.remote_shell, host, "true"),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                check=False,
                timeout=ANSWER_SECONDS,
            )
        except subprocess.TimeoutExpired:
            return False
        return done.returncode == 0

    def _forward(self, number: int) -> None:
        """Forward a signal to the ranks of every host, by the process number that its torchrun noted."""
        for node_rank, run in enumerate(self.runs):
            line = f"pkill -{number} -P $(cat {shlex.quote(self.pid_file(node_rank))})"
            subprocess.run(remote_command(self.remote_shell, run.host, line), stdin=subprocess.DEVNULL, check=False)

    def _wait(self) -> Outcome:
        """Wait for all hosts; after a first failure the others are terminated, then killed."""
        failed: HostRun | None = None
        escalation = [signal.SIGTERM, signal.SIGKILL]  # once each: torchrun counts a second one as another order
        deadline = float("inf")
        while any(run.process.poll() is None for run in self.runs):
            if failed is None:
                # The first host that failed names the cause: the others fail because of it.
                failed = next((run for run in self.runs if run.process.poll()), None)
                deadline = float("inf") if failed is None else time.monotonic() + GRACE_SECONDS
            if escalation and time.monotonic() > deadline:
                number = escalation.pop(0)
                deadline = time.monotonic() + TORCHRUN_STOP_SECONDS
                for run in self.runs:
                    run.stop(number)
            time.sleep(0.1)
        for run in self.runs:
            assert run.reader is not None, "every host has a reader"
            run.reader.join()
        failed = failed or next((run for run in self.runs if run.process.poll()), None)
        return Outcome(DONE) if failed is None else explain_failure(failed)


def explain_failure(run: HostRun) -> Outcome:
    """Exit code and cause of a host's failure, from the report with which torchrun ends."""
    text = "\n".join(run.lines)
    codes = {int(code) for code in re.findall(r"exitcode\s*:\s*(-?\d+)", text)}
    last = next((line for line in reversed(run.lines) if is_telling(line)), f"exit code {run.process.returncode}")
    cause = run.message or last
    return Outcome(BAD_INPUT if BAD_INPUT in codes else RUN_FAILED, f"{run.host}: {cause}")
