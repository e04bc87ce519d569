"""The folder of one start of a run in the memory of one node: its name, its room, what is in it, and its removal.

    train.replica_folder/amfm-HOST AND RUN-START/step-N/   files of this node's ranks, copies for the node before, manifest

`START` is the number that this start wrote into `run.dir/owner.json`, by which the next one finds what it left: what a run
directory that was removed had in memory is never taken, and replicas of two starts never mix. The first part of the name lets
a start remove what those before it left on its node, and nothing else.

Which ranks share a node, which node keeps whose copies, and who copies what back to the disk. Only arithmetic.

Nodes form a ring in the order of their lowest ranks: each keeps copies for the one before. So every file is on two nodes,
each node holds twice what its ranks write, and the loss of any node, or of any that are not neighbours, loses nothing.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import socket
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from amfm.data_pipeline.durable.files import file_system_of, read_mounts, try_to_delete
from amfm.data_pipeline.memory import available_bytes
from amfm.data_pipeline.store.node_cache import own_folder
from amfm.pretrain.checkpoint.commit import RankFailure
from amfm.pretrain.checkpoint.files import file_names_by_rank
from amfm.pretrain.checkpoint.manifest_file import list_checkpoints, read_manifest
from amfm.pretrain.ranks.group import RankGroup


@dataclass(frozen=True)
class Nodes:
    """Ranks by node, nodes in the order of their lowest ranks. `keepers`: by rank, who keeps its copy; empty on one node."""

    hosts: tuple[str, ...]
    members: tuple[tuple[int, ...], ...]
    keepers: tuple[int, ...]

    @classmethod
    def of(cls, hosts: Sequence[str]) -> Nodes:
        """Nodes of a run, by the host of each rank. Ranks of the next node share the copies of a node in turns."""
        found: dict[str, list[int]] = {}
        for rank, host in enumerate(hosts):
            found.setdefault(host, []).append(rank)
        members = tuple(tuple(ranks) for ranks in found.values())
        keepers: dict[int, int] = {}
        for node, ranks in enumerate(members if len(members) > 1 else ()):
            keeping = members[(node + 1) % len(members)]
            keepers |= {rank: keeping[place % len(keeping)] for place, rank in enumerate(ranks)}
        return cls(tuple(found), members, tuple(keepers[rank] for rank in sorted(keepers)))

    def node_of(self, rank: int) -> int:
        """Number of a rank's node."""
        return next(node for node, ranks in enumerate(self.members) if rank in ranks)

    def kept_by(self, rank: int) -> list[int]:
        """Ranks of the node before whose copies this rank keeps."""
        return [other for other, keeper in enumerate(self.keepers) if keeper == rank]

    def bytes_of_node(self, node: int, sizes: Sequence[int]) -> int:
        """Bytes of one replica on a node, by the bytes that each rank writes: its own files, and the copies that it keeps."""
        own = self.members[node]
        return sum(sizes[rank] + sum(sizes[other] for other in self.kept_by(rank)) for rank in own)


def find_holders(num_files: int, held: Mapping[int, Collection[int]]) -> dict[int, list[int]]:
    """Find the nodes that hold each rank's file: an empty list if none does. `held`: ranks of the files by node."""
    return {file: [node for node, files in held.items() if file in files] for file in range(num_files)}


def share_out(holders: Mapping[int, Sequence[int]], nodes: Nodes) -> dict[int, tuple[int, int]]:
    """Choose (node, rank) to copy each file: the holder with the least to do, and its ranks in turns."""
    jobs: Counter[int] = Counter()
    chosen = {}
    for file, candidates in holders.items():
        node = min(candidates, key=lambda candidate: jobs[candidate])
        ranks = nodes.members[node]
        chosen[file] = (node, ranks[jobs[node] % len(ranks)])
        jobs[node] += 1
    return chosen


OWN_NAME = re.compile(r"amfm-[0-9a-f]{12}-[0-9a-f]{32}")
GENERATIONS = 2  # the old one goes when the new one stands on all nodes
SPARE_BYTES = 1 << 24  # for manifests


@dataclass(frozen=True)
class Generation:
    """A replica of one step as a node has it: the manifest's digest, how many files belong to it, and which are here."""

    sha256: str
    num_files: int
    held: tuple[int, ...]


@dataclass
class NodeMemory:
    """This node's memory, as each of its ranks sees it; the first of them, which `leads`, makes and removes.

    `token`: of this start, None before it owns the run directory. `remarks`: what to say of what was found.
    """

    folder: Path
    prefix: str
    nodes: Nodes
    rank: int
    token: str | None = None
    remarks: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, folder: str, run_dir: Path, ranks: RankGroup) -> NodeMemory:
        """Agree on the nodes; all ranks must call it. Touches no file."""
        host = socket.gethostname()
        digest = hashlib.sha256(f"{run_dir.resolve()}\0{host}".encode()).hexdigest()[:12]
        return cls(Path(folder), f"amfm-{digest}-", Nodes.of(ranks.all_gather(host)), ranks.rank)

    @property
    def node(self) -> int:
        """Number of this node."""
        return self.nodes.node_of(self.rank)

    @property
    def leads(self) -> bool:
        """Whether this rank makes and removes folders for its node."""
        return self.nodes.members[self.node][0] == self.rank

    def directory(self, token: str | None = None) -> Path:
        """Folder of a start, of this one where none is given."""
        name = f"{self.prefix}{token or self.token}"
        assert OWN_NAME.fullmatch(name), f"{name}: no start owns it yet"
        return self.folder / name

    def list_generations(self, token: str, after_step: int) -> tuple[dict[int, Generation], list[str]]:
        """List what a start left here of later steps, by step, and what is damaged. Sizes are compared, digests are not yet.

        Raises RuntimeError as `own_folder`: what others put there is not trained on.
        """
        found, remarks = {}, []
        if os.path.lexists(self.directory(token)):
            own_folder(self.directory(token), "train.replica_folder")
        for path in list_checkpoints(self.directory(token)):
            try:
                manifest = read_manifest(path)
            except RuntimeError as error:
                remarks.append(str(error))
                continue
            if manifest["step"] > after_step and ".old" not in path.name:
                names, files = file_names_by_rank(manifest), manifest["files"]
                held = [
                    rank
                    for rank, name in names.items()
                    if (path / name).is_file() and (path / name).stat().st_size == files[name]["bytes"]
                ]
                found[manifest["step"]] = Generation(manifest["sha256"], len(files), tuple(held))
        return found, remarks

    def clear(self) -> list[str]:
        """Remove what this start of the run and those before it left on this node; returns warnings."""
        if not self.leads or not self.folder.is_dir():
            return []
        doomed = [path for path in self.folder.glob(f"{self.prefix}*") if OWN_NAME.fullmatch(path.name)]
        return [remark for path in doomed for remark in try_to_delete(path, OWN_NAME)]

    def check_memory(self, own_bytes: int, ranks: RankGroup) -> None:
        """Reject a node whose memory does not hold two replicas; all ranks must call it, before the first step.

        own_bytes: what this rank writes into a checkpoint. Raises RuntimeError on all ranks, naming host, folder and bytes.
        """
        problem, sizes = RankFailure(), ranks.all_gather(own_bytes)
        if self.leads:
            needed = GENERATIONS * (self.nodes.bytes_of_node(self.node, sizes) + SPARE_BYTES)
            with problem.caught():
                # Each save also copies the state of the node's ranks to its memory first.
                free = free_bytes(self.folder, reserved=sum(sizes[rank] for rank in self.nodes.members[self.node]))
                if free < needed:
                    problem.text = (
                        f"{self.nodes.hosts[self.node]} has {free:,} bytes free, and two replicas of its ranks and of "
                        f"the node before take {needed:,}; free some, name another folder, or remove "
                        "train.replica_every_steps"
                    )
        ranks.raise_together(problem.text, f"train.replica_folder={self.folder} cannot keep replicas")

    def describe(self) -> list[str]:
        """What to say of what was found in the memory of the nodes, and of what is kept there."""
        number = len(self.nodes.members)
        where = f"in {self.folder} of {number} nodes, each rank's on two of them"
        alone = f"in {self.folder} of one node: they outlive its ranks and not the node"
        return [*self.remarks, where if number > 1 else alone]


def free_bytes(folder: Path, reserved: int) -> int:
    """Bytes that a folder can still take: of its file system, and of memory next to `reserved` bytes where that is a
    tmpfs.

    A tmpfs promises a part of the memory whether or not programs use it already. Raises OSError for a folder that is not there.
    """
    free = shutil.disk_usage(folder).free
    if file_system_of(folder.resolve(), read_mounts()) != "tmpfs":
        return free
    available = available_bytes()
    return free if available is None else min(free, available - reserved)
