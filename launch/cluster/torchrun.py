"""Launch with torchrun: the command of one node of several, for clusters that start one command a node.

torchrun then does the restarts. Signals go to the ranks below it, which save and end well, where torchrun would kill them
after a while. When the launcher is killed, torchrun ends too, and ranks end with their torchrun.
"""

from __future__ import annotations

import errno
import os
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence

from amfm.launch.cluster.child import ending_with_us
from amfm.launch.cluster.lines import check_host
from amfm.launch.cluster.links import find_port, listen
from amfm.launch.cluster.local import forward_signals
from amfm.launch.console import say
from amfm.launch.rank_command import isolated_python, rank_command
from amfm.pretrain.launcher_protocol import DONE, RUN_FAILED

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
