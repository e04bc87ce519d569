"""The program that the launcher runs on a node: it starts the node's ranks, attempt after attempt, without loading anything twice.

It imports PyTorch, DeepSpeed and what else ranks need once, and forks the ranks of each attempt from that (child.py). A rank
computes and ends; this process never computes and has one thread, so that it can be forked again. Where it cannot be (a library
has started threads, a GPU's driver is awake), or `launch.warm_restarts` is false, ranks are separate processes, and
only this one stays.

Orders come as lines of JSON on standard input: `check` (node_check.py), `start`, `signal`, `stop`. Answers go out among
what the ranks print, as lines of JSON behind a mark. When the launcher or its remote shell is gone, standard input ends, and with it this
process and its ranks.

    python -m amfm.launch.node_server RANKS KEEP_LOADED ARGUMENTS...
"""

from __future__ import annotations

import gc
import json
import os
import select
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from amfm.data_pipeline.memory import no_garbage_collection
from amfm.launch.cluster.child import ForkedRank, RankProcess, name_process, why_not_fork
from amfm.launch.cluster.node_check import main as check_this_node
from amfm.launch.cluster.node_check import reply
from amfm.launch.rank_command import expand_segments, isolated_python, rank_command, rank_variables
from amfm.pretrain.launcher_protocol import GOES_ON, LAUNCHER_PID, RESTART_CAUSE
from amfm.pretrain.monitor.signals import WATCHED, note_signals
from amfm.pretrain.packages import collect_versions

POLL_SECONDS = 0.05
GRACE_SECONDS = 10.0  # for the other ranks of the node to end on their own after one failed
RESETS = WATCHED


def load() -> str:
    """Import what ranks need, once; returns why they cannot be forked from here, empty if they can."""
    reason = why_not_fork()
    if reason:
        return reason
    with no_garbage_collection():
        from amfm.launch.cli import quiet_libraries

        quiet_libraries()
        import amfm.pretrain.checks.check_run
        import amfm.pretrain.stages
        import amfm.pretrain.train  # noqa: F401
    collect_versions()  # of the code that is loaded, and that ranks run whatever is edited later
    gc.freeze()  # what is shared with the ranks stays shared: the collector writes into what it looks at
    return why_not_fork()


class NodeServer:
    """Obeys the launcher until its orders end. `arguments`: an `amfm` command line, of every rank."""

    def __init__(self, num_ranks: int, arguments: Sequence[str], *, warm_restarts: bool) -> None:
        self.num_ranks, self.arguments = num_ranks, list(arguments)
        self.reason = load() if warm_restarts else "launch.warm_restarts=false"
        self.ranks: list[RankProcess] = []
        self.checker: RankProcess | None = None
        self.failed_at: float | None = None

    def serve(self) -> None:
        """Carry out orders and watch the ranks until standard input ends."""
        reply(ready=True, reason=self.reason)
        received = b""
        while True:
            is_busy = bool(self.ranks) or self.checker is not None
            if select.select([0], [], [], POLL_SECONDS if is_busy else 60.0)[0]:
                content = os.read(0, 1 << 16)
                if not content:
                    break
                *lines, received = (received + content).split(b"\n")
                for line in lines:
                    if line.strip():
                        self.obey(json.loads(line))
            self.watch_ranks()
        self.kill()

    def obey(self, order: Mapping[str, Any]) -> None:
        """Carry out one order."""
        if "check" in order:
            self.checker = self.begin_check(order["check"])
        elif "start" in order:
            self.start(order["start"])
        elif "signal" in order:
            for rank in self.ranks:
                rank.send_signal(order["signal"])
        elif "stop" in order:
            self.kill()

    def begin_check(self, request: Mapping[str, Any]) -> RankProcess:
        """Let a separate process check the node, which answers on its own: it computes, and may hang."""
        text = json.dumps(request)
        if self.reason:
            module = [*isolated_python(), "-m", "amfm.launch.cluster.node_check", text]
            return subprocess.Popen(module, stdin=subprocess.DEVNULL)

        def check() -> int:
            check_this_node(text)
            return 0

        return self.fork(check, os.environ)

    def fork(self, run: Callable[[], int], environment: Mapping[str, str]) -> ForkedRank:
        """Fork a process that runs a function, with our output and no input."""

        def without_orders() -> int:
            nothing = os.open(os.devnull, os.O_RDONLY)
            os.dup2(nothing, 0)
            os.close(nothing)
            gc.unfreeze()
            return run()

        return ForkedRank(without_orders, environment, RESETS, is_first=True)

    def start(self, attempt: Mapping[str, Any]) -> None:
        """Start this node's ranks of an attempt: its place among `nodes` and where rank 0 listens."""
        self.failed_at = None
        self.ranks = [self.start_rank(local_rank, attempt) for local_rank in range(self.num_ranks)]

    def start_rank(self, local_rank: int, attempt: Mapping[str, Any]) -> RankProcess:
        """Start one rank with torchrun's variables; rank 0 listens for the others."""
        rank, num_ranks = attempt["node"] * self.num_ranks + local_rank, attempt["nodes"] * self.num_ranks
        environment = {
            **os.environ,
            **rank_variables(rank, num_ranks, self.num_ranks, attempt["master"], attempt["port"]),
            GOES_ON: "1",
            LAUNCHER_PID: str(os.getpid()),
            # `ssh -tt` gives ranks a terminal, but their lines go into the launcher's output: no panel that is redrawn.
            "TERM": "dumb",
        } | ({RESTART_CAUSE: attempt["cause"]} if attempt["cause"] else {})
        if self.reason:
            return subprocess.Popen(rank_command(self.arguments), env=environment, stdin=subprocess.DEVNULL)

        def run() -> int:
            name_process(f"amfm-rank-{rank}")
            if self.arguments[:1] == ["train"]:
                note_signals()
            from amfm.launch.cli import run as run_command_line

            return run_command_line(self.arguments)

        return self.fork(run, environment)

    def watch_ranks(self) -> None:
        """Report the first rank that failed and of the end of all; the others of the node get GRACE_SECONDS."""
        if self.checker is not None and self.checker.poll() is not None:
            self.checker = None
        if not self.ranks:
            return
        codes = [rank.poll() for rank in self.ranks]
        if self.failed_at is None and any(codes):
            self.failed_at = time.monotonic()
            reply(failed=True)
        if self.failed_at is not None and time.monotonic() > self.failed_at + GRACE_SECONDS:
            self.kill()
            codes = [rank.poll() for rank in self.ranks]
        if all(code is not None for code in codes):
            self.ranks = []
            reply(ended=codes)

    def kill(self) -> None:
        """End all ranks at once, and the check."""
        for process in [*self.ranks, *([self.checker] if self.checker is not None else [])]:
            process.kill()
            process.wait()


def main() -> None:
    """Serve as the command line says."""
    num_ranks, warm_restarts, *arguments = sys.argv[1:]
    with suppress(termios.error):  # no terminal
        settings = termios.tcgetattr(0)
        settings[3] &= ~termios.ECHO  # orders would come back as output
        termios.tcsetattr(0, termios.TCSANOW, settings)
    expand_segments(os.environ)
    # To ask whether there are GPUs must not wake their driver, which no fork survives.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    NodeServer(int(num_ranks), arguments, warm_restarts=warm_restarts == "1").serve()
    # Not by an orderly exit: libraries would report what stays, of objects that no one collects any more.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
