"""Launch on a list of hosts: a server of ranks on each, started once through a remote shell, and orders to it for each attempt.

How it works: every host gets one shell line over ssh that runs `launch.setup` and becomes the server (node_server.py), which
loads Python and libraries once. Before each attempt all servers check their nodes (node_check.py); the first that pass get
the ranks, and `launch.spare_nodes` more wait, loaded, to take the place of one that is lost. What servers and ranks print is
followed for answers and for the cause of a failure, and `supervise.py` restarts all hosts together. A run only on this machine
is such a list of one host, behind a shell of this machine.

A host that fails a check, or was lost twice, is excluded and listed in the run directory: the next launch excludes it too.
"""

from __future__ import annotations

import json
import os
import queue
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from amfm.launch.cluster.child import ending_with_us
from amfm.launch.cluster.lines import check_host, remote_command, shell_line, with_variables
from amfm.launch.cluster.links import find_port
from amfm.launch.cluster.node_check import MARK, ExcludedNodes, blame, make_request
from amfm.launch.cluster.node_logs import find_message, is_telling
from amfm.launch.cluster.supervise import Attempt, Outcome, forward_to_ranks
from amfm.launch.console import say
from amfm.launch.rank_command import isolated_python
from amfm.pretrain.launcher_protocol import BAD_INPUT, DONE, RUN_FAILED

GRACE_SECONDS = 15.0  # for ranks of other hosts to end on their own after one failed
STOP_SECONDS = 10.0  # for a server to end its ranks when told to
READY_SECONDS = 600.0  # to log in, and to load PyTorch from storage that all nodes ask at once
CHECK_SECONDS = 120.0
MAX_CAUSE = 800  # a terminal takes lines of 4,095 characters
HERE = ("sh", "-c", 'exec sh -c "$1"')  # instead of a remote shell, for the host that we are on
KEPT_LINES = 60
POLL_SECONDS = 0.05


def read_hosts(path: Path) -> list[str]:
    """Hosts of a file, one a line; `#` begins a comment.

    Raises ValueError for an empty file, for a host named twice, and for a line that is not a host name.
    """
    lines = [line.partition("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines()]
    hosts = [line for line in lines if line]
    if not hosts:
        raise ValueError(f"{path} names no host; write one host per line")
    twice = {host for host in hosts if hosts.count(host) > 1}
    if twice:
        raise ValueError(f"{path} names {', '.join(sorted(twice))} more than once; one line per host")
    return [check_host(host, str(path)) for host in hosts]


@dataclass(eq=False)
class HostServer:
    """One host's server behind a remote shell: orders go in, and answers, amfm's first message and the last lines come out.

    is_named: whether its lines are shown with the host in front. is_ready: it has loaded everything. port: free by its check.
    """

    host: str
    process: subprocess.Popen[bytes]
    is_named: bool = True
    is_ready: bool = False
    port: int | None = None
    message: str = ""
    lines: deque[str] = field(default_factory=lambda: deque(maxlen=KEPT_LINES))
    answers: queue.Queue[dict[str, Any]] = field(default_factory=queue.Queue)

    def follow(self) -> None:
        """Copy the output to standard error with the host in front, keeping answers, message and last lines."""
        assert self.process.stdout is not None, "started with a pipe"
        for raw in self.process.stdout:
            line = raw.decode(errors="replace").rstrip("\r\n")
            _, is_answer, text = line.partition(MARK)
            if is_answer:
                with suppress(ValueError):
                    self.answers.put(json.loads(text))
            elif line:
                self.lines.append(line)
                self.message = self.message or find_message(line)
                sys.stderr.write(f"{self.host}: {line}\n" if self.is_named else f"{line}\n")
                sys.stderr.flush()
        self.answers.put({"gone": self.process.wait()})

    def order(self, **what: Any) -> None:
        """Send an order; a server that is gone says so on its own."""
        assert self.process.stdin is not None, "started with a pipe"
        with suppress(OSError):
            self.process.stdin.write(json.dumps(what).encode() + b"\n")
            self.process.stdin.flush()

    def wait_for(self, name: str, deadline: float) -> dict[str, Any] | None:
        """The next answer of that name; None if the server is gone, or the deadline is over."""
        while (left := deadline - time.monotonic()) > 0:
            try:
                answer = self.answers.get(timeout=left)
            except queue.Empty:
                return None
            if "gone" in answer:
                self.answers.put(answer)  # for whoever asks next
                return None
            if name in answer:
                return answer
        return None

    def forget(self) -> None:
        """Forget what was said before this attempt."""
        self.message = ""
        self.lines.clear()

    def disconnect(self) -> None:
        """Close the input: the server ends with it, and its ranks with the server."""
        assert self.process.stdin is not None, "started with a pipe"
        with suppress(OSError):
            self.process.stdin.close()

    def close(self, deadline: float) -> None:
        """Wait until the remote shell that was hung up has ended, and kill it where it has not by then."""
        try:
            self.process.wait(timeout=max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def last_words(self) -> str:
        """Why it failed, in its own words: amfm's message, or the last line that says anything."""
        telling = (line for line in reversed(self.lines) if is_telling(line))
        return self.message or next(telling, f"exit code {self.process.returncode}")


class RemoteHosts:
    """Runs attempts on a list of hosts, each through `[*remote_shell, host, line]`, one attempt at a time.

    `port`: of the first attempt, where ranks meet; None: one that is free. `spares`: hosts beyond an attempt's that have a server too. The others of the list come in where these are too few. `inputs`: of `make_request`.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        hosts: Sequence[str],
        *,
        nodes: int,
        ranks_per_node: int,
        port: int | None,
        run_dir: str,
        setup: str | None,
        remote_shell: Sequence[str],
        environment: Mapping[str, str] = {},
        spares: int = 0,
        warm_restarts: bool = True,
        inputs: Mapping[str, str] = {},
    ) -> None:
        self.arguments, self.hosts, self.ranks_per_node, self.port = arguments, list(hosts), ranks_per_node, port
        self.run_dir, self.setup, self.remote_shell = Path(run_dir), setup, list(remote_shell)
        self.environment, self.warm_restarts, self.inputs = environment, warm_restarts, inputs
        self.is_here = tuple(remote_shell) == HERE
        self.nodes, self.spares, self.has_begun = nodes, spares, False
        self.excluded = ExcludedNodes(self.run_dir)
        self.servers: dict[str, HostServer] = {}
        self.checked: list[HostServer] = []  # for the attempt to come, in the order of the list
        self.running: list[HostServer] = []

    def commands(self) -> list[list[str]]:
        """The command line that starts the server of each host."""
        return [
            remote_command(self.remote_shell, host, self._line()) for host in self.hosts[: self.nodes + self.spares]
        ]

    def _line(self) -> str:
        """One line for another host's shell: change directory, run setup, become the server."""
        server = [*isolated_python(), "-m", "amfm.launch.node_server"]
        words = [*server, str(self.ranks_per_node), str(int(self.warm_restarts)), *self.arguments]
        command = shlex.join(with_variables(self.environment, words))
        return shell_line([["cd", os.getcwd()], *([self.setup] if self.setup else []), f"exec {command}"])

    def usable_nodes(self) -> int:
        """Number of hosts that pass the check for the attempt to come, spares among them.

        Those with a server come first. Others are started, and waited for, while these are fewer than the run wants, and at
        first until there are spares too.
        """
        self.checked = [server for server in self.checked if server.process.poll() is None]
        tried = {server.host for server in self.checked}
        warm = [host for host in self.hosts if host not in tried and self._is_warm(host)]
        self.checked += self._check([self.servers[host] for host in warm])
        tried |= set(warm)
        need = self.nodes if self.has_begun else self.nodes + self.spares
        while len(self.checked) < need:
            left = [host for host in self.hosts if host not in tried and host not in self.excluded.reasons]
            if not left:
                break
            chosen = left[: need - len(self.checked)]
            tried |= set(chosen)
            self.checked += self._check(self._get_ready(chosen))
        self.checked.sort(key=lambda server: self.hosts.index(server.host))
        return len(self.checked)

    def _is_warm(self, host: str) -> bool:
        """Whether a host has a server that has loaded everything."""
        server = self.servers.get(host)
        if server is None or server.process.poll() is not None or host in self.excluded.reasons:
            return False
        server.is_ready = server.is_ready or server.wait_for("ready", time.monotonic() + POLL_SECONDS) is not None
        return server.is_ready

    def _refill(self) -> None:
        """Start servers instead of those that are gone, without waiting: spares for the attempt after this one."""
        alive = [host for host, server in self.servers.items() if server.process.poll() is None]
        left = [host for host in self.hosts if host not in alive and host not in self.excluded.reasons]
        for host in left[: max(0, self.nodes + self.spares - len(alive))]:
            self.servers[host] = self._start_server(host)

    def _get_ready(self, hosts: Sequence[str]) -> list[HostServer]:
        """Start servers on these hosts if there are none; returns those that answer, in order."""
        for host in hosts:
            if host not in self.servers or self.servers[host].process.poll() is not None:
                self.servers[host] = self._start_server(host)
        deadline, ready, silent = time.monotonic() + READY_SECONDS, [], []
        for host in hosts:
            server = self.servers[host]
            answer = server.wait_for("ready", deadline)
            if answer is None:
                say(f"amfm launch: {host} does not answer: {server.last_words()}")
                silent.append(server)
                continue
            server.is_ready = True
            if answer.get("reason") and self.warm_restarts:
                say(f"amfm launch: ranks on {host} load everything again in each attempt: {answer['reason']}")
            ready.append(server)
        self._drop(*silent)
        return ready

    def _start_server(self, host: str) -> HostServer:
        """Start the remote shell that becomes a host's server."""
        process = subprocess.Popen(
            ending_with_us(remote_command(self.remote_shell, host, self._line())),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        server = HostServer(host, process, is_named=not self.is_here)
        threading.Thread(target=server.follow, daemon=True).start()
        return server

    def _check(self, servers: Sequence[HostServer]) -> list[HostServer]:
        """Check hosts, all at once and with their links to the first one; returns those that pass. The others are excluded.

        The first is one that has passed before, if there is one. A list of only this machine is not checked: no one could stand
        in.
        """
        if self.is_here or not servers:
            return list(servers)
        request = make_request(self.run_dir, self.ranks_per_node, inputs=self.inputs, reloads=not self.warm_restarts)
        deadline = time.monotonic() + CHECK_SECONDS
        first = self.checked[0] if self.checked else servers[0]
        others = [server for server in servers if server is not first]
        first.order(check=request | {"link": {"expect": len(others)}})
        answer = first.wait_for("listening", deadline) if others else None
        link = {} if answer is None else {"connect": [address_of(first.host), [answer["listening"]]]}
        for server in others:
            server.order(check=request | {"link": link})
        faults: dict[str, list[str]] = {}
        for server in [*others, first]:
            answer = server.wait_for("faults", deadline)
            faults[server.host] = ["it did not answer the check"] if answer is None else answer["faults"]
            server.port = None if answer is None else answer["port"]
        faults = blame(faults, first.host, self.run_dir)
        failed = [server for server in [first, *others] if faults[server.host]]
        for server in failed:
            self.excluded.exclude(server.host, "; ".join(faults[server.host]))
        self._drop(*failed)
        return [server for server in servers if not faults[server.host]]

    def _drop(self, *servers: HostServer) -> None:
        """Give up servers, with one wait for all of them."""
        for server in servers:
            server.disconnect()
        deadline = time.monotonic() + STOP_SECONDS
        for server in servers:
            server.close(deadline)
            self.servers.pop(server.host, None)
        self.checked = [server for server in self.checked if server not in servers]

    def start(self, attempt: Attempt) -> Outcome:
        """Run one attempt on the first hosts that passed the check; the first host that fails ends it for all."""
        if len(self.checked) < attempt.nodes and self.usable_nodes() < attempt.nodes:
            return Outcome(RUN_FAILED, f"{len(self.checked)} of {attempt.nodes} hosts passed the check", began=False)
        self.running, self.checked, self.has_begun = self.checked[: attempt.nodes], [], True
        order = {
            "nodes": attempt.nodes,
            "master": address_of(self.running[0].host),
            # Another port each time: ranks of the last attempt may still hold theirs.
            "port": self.running[0].port or find_port() if self.port is None else self.port + attempt.number,
            "cause": " ".join((attempt.cause or "").split())[:MAX_CAUSE],
        }
        for place, server in enumerate(self.running):
            server.forget()
            server.order(start=order | {"node": place})
        self._refill()
        with forward_to_ranks(self._forward) as interrupt:
            ended = self._wait()
        return interrupt.outcome(ended)

    def _forward(self, number: int) -> None:
        """Forward a signal to the ranks of every host."""
        for server in self.running:
            server.order(signal=number)

    def _wait(self) -> Outcome:
        """Wait for all hosts; after a first failure the others get GRACE_SECONDS, then their ranks are ended."""
        codes: dict[str, list[int]] = {}
        failed: HostServer | None = None
        deadline, has_stopped = float("inf"), False
        waiting = {server.host: server for server in self.running}
        while waiting:
            for host, server in list(waiting.items()):
                try:
                    answer = server.answers.get(timeout=POLL_SECONDS)
                except queue.Empty:
                    continue
                if "failed" in answer or "gone" in answer:
                    # The first host that failed names the cause: the others fail because of it.
                    failed = failed or server
                if "gone" in answer:
                    self._lose(waiting.pop(host))
                elif "ended" in answer:
                    codes[host] = answer["ended"]
                    del waiting[host]
            if failed is not None and deadline == float("inf"):
                deadline = time.monotonic() + GRACE_SECONDS
            if time.monotonic() > deadline and not has_stopped:
                has_stopped, deadline = True, time.monotonic() + STOP_SECONDS
                for server in waiting.values():
                    server.order(stop=True)
            elif time.monotonic() > deadline:
                self._lose(*waiting.values())
                waiting.clear()
        if failed is None:
            return Outcome(DONE)
        refused = any(BAD_INPUT in found for found in codes.values())
        return Outcome(BAD_INPUT if refused else RUN_FAILED, f"{failed.host}: {failed.last_words()}")

    def _lose(self, *servers: HostServer) -> None:
        """Count hosts whose servers are gone, or do not answer any more."""
        self._drop(*servers)
        for server in servers:
            if not self.is_here:
                self.excluded.lose(server.host)

    def close(self) -> None:
        """End all servers."""
        self._drop(*self.servers.values())


def address_of(host: str) -> str:
    """Where ranks reach a host of the list, which may be USER@HOST for ssh."""
    return host.rpartition("@")[2]
