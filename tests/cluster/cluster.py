"""A cluster on one Linux machine for tests of launchers: nodes in namespaces, and real Slurm, sshd and Ray on them.

`network.sh` makes the nodes (own addresses, host names, process numbers, /dev/shm, on one bridge), `slurm.sh` starts munge,
slurmctld and a slurmd per node. Storage is this machine's, as on a cluster with a shared file system. Nothing outside of the
nodes changes, and the machine's own network is not used.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parent
NETWORK, SLURM = str(FOLDER / "network.sh"), str(FOLDER / "slurm.sh")
PROGRAMS = {
    "network": ("ip", "nsenter", "unshare", "tc", "nft"),
    "ssh": ("sshd", "ssh", "ssh-keygen"),
    "slurm": ("munged", "slurmctld", "slurmd", "sbatch", "srun"),
    "accounts": ("slurmdbd", "mariadbd", "mariadb-install-db", "mariadb-admin", "sacctmgr"),
}
# On two cores that do other work too. A run that is healthy comes to its next step long before.
START_SECONDS, PATIENCE_SECONDS = 900.0, 2000.0
GIVEN_UP = ("amfm: launch stopped", "not starting again", "are used up", "Aborted")
FAKE_CLOCK = next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), None)
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"


def missing(*engines: str) -> str:
    """Why these engines cannot run here, empty if they can."""
    if os.geteuid():
        return "needs root, for namespaces"
    lacks = [name for engine in ("network", *engines) for name in PROGRAMS[engine] if not shutil.which(name, path=PATH)]
    return (
        f"needs {', '.join(lacks)}: Debian's iproute2, nftables, util-linux, openssh-server, slurm-wlm, munge, slurmdbd, mariadb-server"
        if lacks
        else ""
    )


@dataclass
class Cluster:
    """Nodes 1 to `count`, and node 0 for logins; `folder` holds their state and has a short path."""

    folder: Path
    count: int
    engine: str = ""
    environment: dict[str, str] = field(default_factory=dict)

    def enter(self, node: int, *command: str) -> list[str]:
        """Command line that runs a command on a node."""
        return [NETWORK, "enter", str(self.folder), str(node), *command]

    def try_to(self, node: int, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command on a node, which may fail."""
        return subprocess.run(
            self.enter(node, *command), capture_output=True, text=True, check=False, env=os.environ | self.environment
        )

    def run(self, node: int, *command: str, check: bool = True) -> str:
        """Run a command on a node and return what it printed."""
        done = self.try_to(node, *command)
        assert not check or done.returncode == 0, (command, done.stdout[-2000:], done.stderr[-2000:])
        return done.stdout.strip()

    def start(self, node: int, log: Path, *command: str) -> subprocess.Popen[bytes]:
        """Start a command on a node with its output in a file."""
        with log.open("wb") as out:
            return subprocess.Popen(
                self.enter(node, *command),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env=os.environ | self.environment,
            )

    def fault(self, verb: str, node: int, *arguments: str) -> None:
        """Inject a fault of network.sh: cut, heal, oneway, slow, lose, add."""
        subprocess.run([NETWORK, verb, str(self.folder), str(node), *arguments], check=True)


@contextmanager
def cluster(count: int, engine: str = "", *, folder: Path, options: Sequence[str] = ()) -> Iterator[Cluster]:
    """Nodes with an engine (`ssh`, `slurm`, `ray` or none) for the time of the block; `options`: of `slurm.sh up`."""
    made = Cluster(folder, count, engine)
    try:
        if engine == "slurm":
            made.environment = {"SLURM_CONF": str(folder / "slurm.conf")}
            quietly(SLURM, "up", str(folder), str(count), *options)
        else:
            quietly(NETWORK, "up", str(folder), str(count))
        if engine == "ssh":
            quietly(NETWORK, "ssh-up", str(folder))
        if engine == "ray":
            made.environment = {"RAY_AUTH_TOKEN_PATH": str(folder / "ray_token")}
            quietly(NETWORK, "ray-up", str(folder), str(Path(sys.executable).parent))
        yield made
    finally:
        quietly(NETWORK, "down", str(folder))


# Ranks that are processes of their own, and not the programs that have their command line in theirs.
RANK = "^[^ ]+ -P -m amfm.launch train "


def signal_ranks(nodes: Cluster, node: int, name: str) -> None:
    """Signal the ranks of a node that are processes of their own."""
    nodes.run(node, "pkill", f"-{name}", "-f", RANK)


def catches(nodes: Cluster, node: int, number: int) -> bool:
    """Whether the first rank of a node catches a signal: it has begun."""
    pid = nodes.run(node, "pgrep", "-o", "-f", RANK, check=False)
    text = nodes.run(node, "grep", "SigCgt", f"/proc/{pid}/status", check=False)
    return bool(text) and bool(int(text.split()[1], 16) >> (number - 1) & 1)


def wrong_clock(node: int, seconds: int) -> str:
    """Shell text after which everything on a node, and nothing elsewhere, sees a clock that is ahead by these seconds."""
    variables = f"LD_PRELOAD={FAKE_CLOCK} FAKETIME={seconds:+d}s FAKETIME_DONT_FAKE_MONOTONIC=1"
    return f"if [ $(hostname) = node{node} ]; then export {variables}; fi"


def quietly(*command: str) -> None:
    """Run a script, showing its output only where it fails."""
    # To a file: what stays behind (daemons) would hold a pipe open.
    with open(f"{command[2]}.{command[1]}.out", "w+") as out:
        code = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, check=False).returncode
        out.seek(0)
        assert code == 0, (command, out.read()[-3000:])


def amfm(*arguments: str | Path) -> list[str]:
    """An `amfm` command line for a node."""
    return [sys.executable, "-P", "-m", "amfm.launch", *map(str, arguments)]


def wait_until(condition: Callable[[], Any], seconds: float, log: Path | None = None) -> Any:
    """Wait for a condition to hold and return its value; fails with the end of a log, at once where its launcher has given up."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        text = log.read_text()[-4000:] if log and log.exists() else ""
        assert time.monotonic() < deadline and not any(words in text for words in GIVEN_UP), text or "it never came"
        time.sleep(0.2)
    return value


def wait_for_steps(run_dir: Path, count: int, log: Path) -> None:
    """Wait until a run has taken this many steps."""
    wait_until(lambda: len(metrics(run_dir)) >= count, START_SECONDS, log)


def end_well(launcher: subprocess.Popen[bytes], log: Path) -> None:
    """Wait for the launcher, which must end with 0."""
    assert launcher.wait(timeout=PATIENCE_SECONDS) == 0, log.read_text()[-4000:]


def cut_for_a_while(nodes: Cluster, node: int, launcher: subprocess.Popen[bytes]) -> None:
    """Cut a node's link for 20 s, in which the launcher must not end."""
    nodes.fault("cut", node)
    with pytest.raises(subprocess.TimeoutExpired):
        launcher.wait(timeout=20)  # short: it must not end
    nodes.fault("heal", node)


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Lines of a run's metrics, the last of each step."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    found = {line["step"]: line for text in lines if text.endswith("}") for line in [json.loads(text)]}
    return [found[step] for step in sorted(found)]


def events(run_dir: Path, name: str) -> list[dict[str, Any]]:
    """A run's events of one name."""
    path = run_dir / "events.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [line for text in lines if text.endswith("}") for line in [json.loads(text)] if line["event"] == name]
