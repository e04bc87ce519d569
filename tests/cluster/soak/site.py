"""The cluster of a soak, its run, and what an operator does there: submit, look, bring back what was lost."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from amfm.pretrain.config.file import resolved_yaml
from amfm.pretrain.config.schema import RunConfig
from tests.cluster.cluster import FAKE_CLOCK, RANK, SLURM, START_SECONDS, Cluster, quietly, wait_until
from tests.cluster.test_slurm import launch_command, let_start
from tests.pretrain.tiny_run import tiny_config, tiny_data

NUM_NODES = 4
STEPS = 300
PAUSE_SECONDS = 0.8  # in each step
SAVED_EVERY_STEPS = 10


def write_run(folder: Path, run_dir: Path, pause: float) -> RunConfig:
    """The configuration of a run for two ranks; run.yaml is next to its directory."""
    clock = f"LD_PRELOAD={FAKE_CLOCK} FAKETIME_TIMESTAMP_FILE={folder}/clock FAKETIME_DONT_FAKE_MONOTONIC=1"
    clock += " FAKETIME_DISABLE_SHM=1"  # whose name srun would carry to nodes that do not have it, where ranks would wait for good
    config = tiny_config(
        tiny_data(folder / "data"),
        run_dir,
        train__steps=STEPS,
        train__global_batch_size=8,
        train__checkpoint_every_steps=SAVED_EVERY_STEPS,
        train__timeout_seconds=180,  # short: ranks wait so long for one that was killed, and an hour holds thirty faults
        hooks__pause={"seconds": pause},
        launch__heartbeat_seconds=60.0,
        launch__node_wait_seconds=10.0,
        launch__min_nodes=2,  # never fewer: sums over another number of ranks differ in their last bits
        launch__spare_nodes=1,
        launch__max_restarts=1000,
        launch__setup=f"if [ -e {folder}/wrong-clock ]; then export {clock}; fi",
        launch__slurm={"gpus": False, "signal_seconds": 60},
    )
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    (run_dir.parent / "run.yaml").write_text(resolved_yaml(config))
    return config


@dataclass
class Site:
    """A cluster with one job at a time. `repairs`: what an operator does later, each with its moment."""

    nodes: Cluster
    folder: Path
    root: Path  # of the present run: run.yaml and run
    job: str = ""
    repairs: list[tuple[float, Callable[[], None]]] = field(default_factory=list)
    lost: set[int] = field(default_factory=set)

    @property
    def run_dir(self) -> Path:
        return self.root / "run"

    def submit(self) -> None:
        """Give the run to Slurm, as someone who has looked after the nodes."""
        (self.run_dir / "launch/excluded_nodes.json").unlink(missing_ok=True)
        self.job = self.nodes.run(0, *launch_command(self.root, 2)).split()[-1]

    def show(self) -> dict[str, str] | None:
        """What the controller says of the job; None if it does not answer."""
        done = self.nodes.try_to(0, "scontrol", "-o", "show", "job", self.job)
        return None if done.returncode else dict(word.partition("=")[::2] for word in done.stdout.split())

    def keep_going(self, fields: dict[str, str]) -> None:
        """Let a job that was queued again start now, and not after Slurm's two minutes."""
        if fields["JobState"] == "PENDING" and "dependency" not in fields["Reason"].lower():
            let_start(self.nodes, self.job)

    def ranks(self) -> list[tuple[int, str]]:
        """Node and process of each rank."""
        found = []
        for node in sorted(set(range(1, NUM_NODES + 1)) - self.lost):
            pids = self.nodes.run(node, "pgrep", "-f", f"{RANK}{self.root}/", check=False).split()
            found += [(node, pid) for pid in pids]
        return found

    def later(self, seconds: float, repair: Callable[[], None]) -> None:
        """Have something repaired after this many seconds."""
        self.repairs.append((time.monotonic() + seconds, repair))

    def repair(self) -> None:
        """Do the repairs that are due."""
        now = time.monotonic()
        for due, repair in [each for each in self.repairs if each[0] <= now]:
            repair()
            self.repairs.remove((due, repair))

    def finish_repairs(self) -> None:
        """Wait for all repairs, and do them."""
        while self.repairs:
            time.sleep(0.25)
            self.repair()

    def settle(self) -> float:
        """Wait for repairs, and for a second job of the run, which waits for the end of the first; seconds that it took then."""
        self.finish_repairs()
        began = time.monotonic()
        wait_until(lambda: not self.nodes.run(0, "squeue", "--noheader", check=False), START_SECONDS)
        return time.monotonic() - began

    def lose(self, node: int) -> None:
        """Take the power from a node for 50 seconds, after which it comes back and is at the site's service."""
        self.lost.add(node)
        self.nodes.fault("lose", node)
        self.later(50.0, lambda: self.bring_back(node))

    def bring_back(self, node: int) -> None:
        """Start a node that was lost."""
        self.nodes.fault("add", node)
        quietly(SLURM, "node", str(self.nodes.folder), str(node))
        self.lost.discard(node)
        self.set_clock(node, 0)

    def set_clock(self, node: int, seconds: int) -> None:
        """Say what the clock of a node is for jobs that start while `wrong-clock` is there."""
        own = self.folder / f"clock-{node}"
        own.write_text(f"{seconds:+d}s\n")
        self.nodes.run(node, "mount", "--bind", str(own), str(self.folder / "clock"))

    def processes(self) -> list[str]:
        """Processes of the run, on all nodes."""
        return [
            f"node{node}: {line}"
            for node in sorted(set(range(1, NUM_NODES + 1)) - self.lost)
            for line in self.nodes.run(node, "pgrep", "-af", f"amfm.*{self.root}/", check=False).splitlines()
        ]

    def leftovers(self) -> list[str]:
        """Processes, shared memory and files that a run that ended has left; those of libfaketime are its own."""
        found = self.processes()
        for node in range(1, NUM_NODES + 1):
            names = self.nodes.run(node, "ls", "/dev/shm").split()
            found += [f"node{node}: /dev/shm/{name}" for name in names if "faketime" not in name]
        left = (".writing", "check-node", "starting")
        return found + [
            str(path.relative_to(self.root)) for path in self.run_dir.rglob("*") if path.name.startswith(left)
        ]


def kill(nodes: Cluster, node: int, number: str, pid: str) -> None:
    """Signal a process of a node."""
    nodes.run(node, "kill", f"-{number}", pid, check=False)


def fill(disk: Path) -> None:
    """Write until a disk takes no more."""
    with (disk / "filler").open("wb", buffering=0) as filler, suppress(OSError):
        while filler.write(bytes(1 << 12)):
            pass


def mount_disk(path: Path) -> None:
    """Make a small file system, which nodes that are made after it share."""
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=80m", "tmpfs", str(path)], check=True)
