"""Which ranks share a node, which node keeps whose copies, and who copies what back to the disk. Arithmetic alone.

Nodes form a ring in the order of their lowest ranks: each keeps copies for the one before. So every file lies on two nodes,
each node holds twice what its ranks write, and the loss of any node, or of any that are not neighbours, loses nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass


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
    """Find the nodes that hold each rank's file: an empty list where none does. `held`: ranks of the files by node."""
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
