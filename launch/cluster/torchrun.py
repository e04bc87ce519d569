"""Launch with torchrun: the command of one node of several, for clusters that start one command a node.

torchrun then does the restarts. Signals go to the ranks below it, which save and end well, where torchrun would kill them
after a while. When the launcher is killed, torchrun ends too, and ranks end with their torchrun.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence

from amfm.launch.cluster.lines import check_host
from amfm.launch.cluster.local import forward_signals
from amfm.launch.cluster.orphans import ending_with_us
from amfm.launch.rank_command import isolated_python, rank_command
from amfm.pretrain.launcher_protocol import DONE, RUN_FAILED


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


def run_here(command: Sequence[str], environment: Mapping[str, str] = {}) -> int:
    """Run this node's torchrun, with more variables if given, and return the exit code; torchrun itself restarts its ranks."""
    process = subprocess.Popen(ending_with_us(command), env=os.environ | dict(environment))
    with forward_signals(lambda number: signal_children(process.pid, number)):
        code = process.wait()
    return RUN_FAILED if code else DONE


def signal_children(pid: int, number: int) -> None:
    """Signal the ranks below a torchrun: they save and end well, where torchrun would kill them after a while."""
    subprocess.run(["pkill", f"-{number}", "-P", str(pid)], check=False)
