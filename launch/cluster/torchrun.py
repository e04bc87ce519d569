"""Launch with torchrun: the command of one node of several, for clusters that start one command a node.

torchrun then does the restarts. Signals go to the ranks below it, which save and end well, where torchrun would kill them
after a while. When the launcher is killed, torchrun ends too, and ranks end with their torchrun.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from amfm.launch.cluster.lines import check_host
from amfm.launch.cluster.local import forward_signals
from amfm.launch.cluster.orphans import ending_with_us
from amfm.pretrain.launcher_protocol import DONE, RUN_FAILED


@dataclass(frozen=True)
class NodeCommand:
    """Command of one node: its share of the ranks of `arguments` (an `amfm` command line)."""

    arguments: Sequence[str]
    nodes: int
    ranks_per_node: int
    node_rank: int
    master: str
    port: int
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
