"""Ranks on this machine: start them, forward signals, and join their exit codes into one; or hand them to a torchrun.

How it works: this process listens on a free port and keeps the TCPStore through which ranks meet; the socket is never
closed in between, so no other program can take the port. Ranks are ordinary processes with torchrun's variables. Rank 0
owns the terminal, the others' standard error is relayed with their rank in front. Where it is safe this process imports what
ranks need, once, and forks them (child.py); else they are separate processes, which start first, and this process
imports torch next to them.

torchrun is for clusters that start one command a node: it has the ranks of one node of several, and does the restarts. Signals go
to the ranks below it, which save and end well, where torchrun would kill them after a while. When the launcher is killed,
torchrun ends too, and ranks end with their torchrun.
"""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from amfm.data_pipeline.memory import no_garbage_collection
from amfm.launch.cluster.child import ForkedRank, RankProcess, can_fork, ending_with_us
from amfm.launch.cluster.lines import check_host
from amfm.launch.cluster.links import find_port, listen
from amfm.launch.console import say
from amfm.launch.rank_command import isolated_python, rank_command, rank_variables
from amfm.pretrain.checkpoint.manifest_file import continued_step
from amfm.pretrain.checks.stages import ranks_of_stage
from amfm.pretrain.config.schema import RunConfig
from amfm.pretrain.launcher_protocol import (
    DONE,
    GOES_ON,
    INTERRUPTED,
    LAUNCHER_PID,
    NEXT_LAYOUT,
    RUN_FAILED,
    VANISHED,
    has_vanished,
)
from amfm.pretrain.monitor.signals import SAVING, take_noted
from amfm.pretrain.stages import resolve_stages, stage_of

GRACE_SECONDS = 30.0  # what the other ranks get to end on their own after one failed
FORWARDED = SAVING
HOST = "127.0.0.1"


def run_local(arguments: Sequence[str], num_ranks: int) -> int:
    """Run one `amfm` command line as `num_ranks` ranks on this machine and return the exit code.

    0 when every rank ended well; the code of a rank that rejected its input or hit a bug; else 3, also when a rank was
    killed.
    """
    return run_command(rank_command(arguments), num_ranks)


def run_layouts(
    config: RunConfig, arguments: Sequence[str], num_ranks: int, run: Callable[[Sequence[str]], int]
) -> int:
    """Run `amfm train` as ranks on this machine, again for each stage with its own layout; returns the exit code.

    Such a stage runs on as many of the ranks as its layout can use. `run`: the command line, which forked ranks call.
    """
    stages = resolve_stages(config)
    while True:
        stage = stage_of(stages, max(0, continued_step(config)))
        ranks = ranks_of_stage(config, stage, range(num_ranks, 0, -1))
        if ranks < num_ranks:
            sys.stderr.write(f"amfm: stage {stage.name} runs on {ranks} of {num_ranks} ranks, which suit its layout\n")
        code = run_train(arguments, ranks, {GOES_ON: "1"}, run)
        if code == DONE and has_vanished(Path(config.run.dir)):
            sys.stderr.write(f"amfm: {VANISHED}\n")
            return RUN_FAILED
        if code != NEXT_LAYOUT:
            return code


def run_train(
    arguments: Sequence[str], num_ranks: int, variables: Mapping[str, str], run: Callable[[Sequence[str]], int]
) -> int:
    """Run an `amfm train` command line as ranks on this machine, forked where that is safe; returns the exit code."""
    if not can_fork():
        return run_command(rank_command(arguments), num_ranks, variables)
    with no_garbage_collection():
        import amfm.pretrain.train  # noqa: F401 - what ranks need is here once, before they are copied
    if not can_fork():  # an import has started a thread
        return run_command(rank_command(arguments), num_ranks, variables)
    return run_forked(lambda: run(arguments), num_ranks, variables)


def run_forked(run: Callable[[], int], num_ranks: int, variables: Mapping[str, str] = {}) -> int:
    """Run a function as ranks that are forked from this process, and as `run_command` says."""

    def start(rank: int, environment: Mapping[str, str]) -> ForkedRank:
        return ForkedRank(run, environment, (*FORWARDED, signal.SIGINT), is_first=rank == 0)

    return run_ranks(start, num_ranks, variables)


def run_command(command: Sequence[str], num_ranks: int, variables: Mapping[str, str] = {}) -> int:
    """Run any command as ranks that find each other as torchrun's do, with more environment variables if given.

    Returns one exit code for all ranks (`join_codes`). Rank 0 owns the terminal; lines that the others write to
    standard error get their rank in front, their standard output is dropped.
    """

    def start(rank: int, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            command,
            env=environment,
            stdin=None if rank == 0 else subprocess.DEVNULL,
            stdout=None if rank == 0 else subprocess.DEVNULL,
            stderr=None if rank == 0 else subprocess.PIPE,
        )

    return run_ranks(start, num_ranks, variables)


def run_ranks(
    start: Callable[[int, Mapping[str, str]], RankProcess], num_ranks: int, variables: Mapping[str, str]
) -> int:
    """Start ranks, each with its number and variables, serve them until they have ended, and return one exit code."""
    processes: list[RankProcess] = []

    def forward(number: int) -> None:
        if number == signal.SIGINT:  # from the keyboard it reaches ranks on its own; here it must not cut waiting short
            return
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    with (
        forward_signals(forward, (*FORWARDED, signal.SIGINT)),
        socket.create_server((HOST, 0), backlog=max(128, num_ranks)) as listener,
    ):
        port = listener.getsockname()[1]
        given = {**os.environ, **variables}
        processes += [start(rank, environment_of(rank, num_ranks, port, given)) for rank in range(num_ranks)]
        relays = [
            threading.Thread(target=relay_lines, args=(rank, process.stderr), daemon=True)
            for rank, process in enumerate(processes)
            if process.stderr is not None
        ]
        for relay in relays:
            relay.start()
        # Imported after the start: ranks of their own import theirs meanwhile. The object serves them until this block ends.
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        store = TCPStore(HOST, port, is_master=True, wait_for_workers=False, master_listen_fd=os.dup(listener.fileno()))
        codes = wait_for_all(processes)
        del store
    for relay in relays:
        relay.join()
    return join_codes(codes)


def environment_of(rank: int, num_ranks: int, port: int, environment: Mapping[str, str]) -> dict[str, str]:
    """Variables that torchrun would set for a rank, and the process number of the launcher."""
    return {
        **environment,
        **rank_variables(rank, num_ranks, num_ranks, HOST, port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        LAUNCHER_PID: str(os.getpid()),
    }


def relay_lines(rank: int, stream: IO[bytes]) -> None:
    """Copy a rank's standard error to ours line by line, with the rank in front."""
    for line in stream:
        sys.stderr.write(f"rank {rank}: {line.decode(errors='replace')}")
        sys.stderr.flush()


@contextmanager
def forward_signals(forward: Callable[[int], None], numbers: Sequence[signal.Signals] = FORWARDED) -> Iterator[None]:
    """Inside the block, hand signals `numbers` to `forward` instead of letting them end this process.

    The former handlers come back at the end. Call it from the main thread: Python sets signal handlers nowhere else.
    """
    previous = {number: signal.signal(number, lambda received, frame: forward(received)) for number in numbers}
    for number in take_noted():
        forward(number)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def wait_for_all(processes: Sequence[RankProcess]) -> list[int]:
    """Wait for every rank and return the exit codes; after a first failure the rest get `GRACE_SECONDS`.

    Then they are killed: a rank that waits in a collective for a dead one reacts to nothing gentler.
    """
    deadline: float | None = None
    while any(process.poll() is None for process in processes):
        if deadline is None and any(process.poll() for process in processes):
            deadline = time.monotonic() + GRACE_SECONDS
            name_killed([process.poll() for process in processes])
        if deadline is not None and time.monotonic() > deadline:
            for process in processes:
                process.kill()
        time.sleep(0.05)
    codes = [process.wait() for process in processes]
    if deadline is None:
        name_killed(codes)  # they ended faster than one looked
    return codes


def name_killed(codes: Sequence[int | None]) -> None:
    """Name the ranks that a signal ended on standard error, before others fail because of them."""
    for rank, code in enumerate(codes):
        if code is not None and code < 0:
            sys.stderr.write(f"rank {rank}: ended by {signal.Signals(-code).name}\n")


def join_codes(codes: Sequence[int]) -> int:
    """One exit code for all ranks: 0 if all are 0; a rejection or a bug before RUN_FAILED, which it usually causes."""
    if -signal.SIGINT in codes:  # the second Ctrl-C
        return INTERRUPTED
    telling = [code for code in codes if code > 0 and code != RUN_FAILED]
    if telling:
        return telling[0]
    return RUN_FAILED if any(codes) else DONE


POLL_SECONDS = 1.0
SILENT_SECONDS = 60.0
MEETING_SECONDS = 1800.0


def torchrun_command(
    arguments: Sequence[str],
    *,
    nodes: int,
    ranks_per_node: int,
    node_rank: int,
    master: str,
    port: int,
    max_restarts: int,
) -> list[str]:
    """The command line of one node's torchrun, which sets rank variables and stops the node's ranks when one fails.

    `arguments`: an `amfm` command line, of every rank. Raises ValueError for a master that is not a host name.
    """
    check_host(master, "--master")
    return [
        *isolated_python(),
        *("-m", "torch.distributed.run"),
        f"--nnodes={nodes}",
        f"--nproc-per-node={ranks_per_node}",
        f"--node-rank={node_rank}",
        f"--master-addr={master}",
        f"--master-port={port}",
        f"--max-restarts={max_restarts}",
        # As a program: torchrun's own way to start Python would look into the working directory.
        *("--no-python", *rank_command(arguments)),
    ]


def run_here(
    command: Sequence[str], environment: Mapping[str, str] = {}, *, node_rank: int, master: str, port: int
) -> int:
    """Run this node's torchrun, with more variables if given, and return the exit code; torchrun itself restarts its ranks.

    Raises RuntimeError on the first node if another program has the port at which nodes meet.
    """
    if node_rank == 0:
        require_free(master, port)
    process = subprocess.Popen(ending_with_us(command), env=os.environ | dict(environment))
    threading.Thread(target=await_ranks, args=(process, f"{master}:{port}"), daemon=True).start()
    with forward_signals(lambda number: signal_children(process.pid, number)):
        code = process.wait()
    return RUN_FAILED if code else DONE


def require_free(master: str, port: int) -> None:
    """Raise RuntimeError if another program listens at a port of this node; torchrun would say so in a traceback."""
    try:
        listen(port).close()
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        raise RuntimeError(
            f"port {port}, where the nodes meet, is taken on this one; give every node another: --master {master}:{find_port()}"
        ) from error


def await_ranks(process: subprocess.Popen[bytes], place: str) -> None:
    """Say it where a torchrun starts no ranks, and end it where that lasts: it would wait for good for another program's answer."""
    began, is_said = time.monotonic(), False
    while process.poll() is None and not has_children(process.pid):
        waited = time.monotonic() - began
        if waited > SILENT_SECONDS and not is_said:
            is_said = True
            say(
                f"amfm launch: no ranks after {SILENT_SECONDS:.0f} s: the other nodes have not come to {place} yet, or another "
                "program has that port on the first node; then give every node another --master HOST:PORT"
            )
        if waited > MEETING_SECONDS:
            say(f"amfm launch: the nodes did not meet at {place} within {MEETING_SECONDS:.0f} s; not waiting longer")
            process.kill()
        time.sleep(POLL_SECONDS)


def has_children(pid: int) -> bool:
    """Whether a process has started others."""
    return subprocess.run(["pgrep", "-P", str(pid)], stdout=subprocess.DEVNULL, check=False).returncode == 0


def signal_children(pid: int, number: int) -> None:
    """Signal the ranks below a torchrun: they save and end well, where torchrun would kill them after a while."""
    subprocess.run(["pkill", f"-{number}", "-P", str(pid)], check=False)
