"""Write a replica: the files of a checkpoint in the memory of two nodes, complete on all of them before an older one goes.

1. The first rank of each node removes leftovers and makes `step-N.tmp` in its folder.
2. Each rank writes its file there, as for a checkpoint on the disk, and sends it to the rank of the next node that keeps it.
3. When all have what they should, rank 0 joins the reports into the manifest, and each node commits: `step-N`.
4. When all nodes have committed, each removes what is older.

Killed before the last of them commits, the older generation is whole on all nodes; killed after, the new one is. What fails
on a node (memory that others filled) is a warning on all ranks and leaves the older generation, because the checkpoints on
the disk stand; a rank that is lost ends the run as anywhere else.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist

from amfm.data_pipeline.durable.files import try_to_delete
from amfm.data_pipeline.store.node_cache import own_folder
from amfm.pretrain.checkpoint.commit import TEMPORARY_NAME, RankFailure, commit, discard, remove_temporary
from amfm.pretrain.checkpoint.files import make_place, write_tensors
from amfm.pretrain.checkpoint.manifest import JoinedReports, complete_manifest
from amfm.pretrain.checkpoint.manifest_file import rank_file_name
from amfm.pretrain.checkpoint.names import checkpoint_name, list_checkpoints
from amfm.pretrain.checkpoint.replicas.memory import NodeMemory
from amfm.pretrain.checkpoint.save import Snapshot
from amfm.pretrain.ranks.group import RankGroup
from amfm.pretrain.tensor_files import tensor_bytes

BLOCK_BYTES = 1 << 24  # sent at a time


@dataclass(frozen=True)
class SavedReplica:
    """A replica that stands, or why it does not (`problem`): its step, bytes of one copy over all ranks, and seconds."""

    step: int
    num_bytes: int
    seconds: float
    problem: str | None
    event: ClassVar[str] = "replica"

    def facts(self) -> dict[str, Any]:
        """What its event says."""
        written = {"bytes": self.num_bytes, "seconds": self.seconds} if self.problem is None else {}
        return {"problem": self.problem} | written

    def warnings(self) -> tuple[str, ...]:
        """What the user is told."""
        if self.problem is None:
            return ()
        return (f"the replica of step {self.step} was not written, training continues: {self.problem}",)


def write_replica(memory: NodeMemory, snapshot: Snapshot, ranks: RankGroup) -> SavedReplica:
    """Write, send, commit and remove the older one, as the file's head says. All ranks must call it."""
    begun, failure = time.monotonic(), RankFailure()
    directory, name = memory.directory(), checkpoint_name(snapshot.step)
    temporary_dir = directory / f"{name}.tmp"
    size = 0
    if memory.leads:
        with failure.caught():
            own_folder(directory, "train.replica_folder")
            remove_temporary(directory)
            temporary_dir.mkdir()
    problem = first_problem(failure, ranks)
    report = snapshot.report
    if problem is None:
        with failure.caught():
            path = make_place(temporary_dir, rank_file_name(ranks.rank))
            file = write_tensors(path, snapshot.tensors, snapshot.metadata())
            report, size = dataclasses.replace(report, file=file), file.num_bytes
        problem = first_problem(failure, ranks)
    sizes = ranks.all_gather(size)
    if problem is None:
        send_copies(temporary_dir, sizes, memory, ranks, failure)
        problem = first_problem(failure, ranks)
    if problem is None:
        joined = ranks.merge_to_first(JoinedReports.of(ranks.rank, report), JoinedReports.joined)
        manifest: dict[str, Any] = {} if joined is None else complete_manifest(snapshot.manifest, joined)
        manifest = ranks.broadcast(manifest)
        if memory.leads:
            with failure.caught():
                commit(temporary_dir, manifest)
        problem = first_problem(failure, ranks)
    if memory.leads:
        with failure.caught():
            try_to_delete(temporary_dir, TEMPORARY_NAME)
            for path in list_checkpoints(directory):
                if (path.name == name) == (problem is not None):
                    discard(path)
    return SavedReplica(snapshot.step, sum(sizes), time.monotonic() - begun, problem)


def first_problem(failure: RankFailure, ranks: RankGroup) -> str | None:
    """What the first rank with a problem says, on all ranks; None if none has one. All ranks must call it."""
    told = ranks.collect(failure.text)
    return next((f"rank {rank}: {text}" for rank, text in told.items()), None)


def send_copies(
    temporary_dir: Path, sizes: list[int], memory: NodeMemory, ranks: RankGroup, failure: RankFailure
) -> None:
    """Send this rank's file to its keeper, and write those that it keeps, block by block; nothing on one node.

    All ranks must call it: in each round all send and receive at once, so that none waits for a chain of others. An error
    of this rank's memory is kept in `failure`, and the round continues.
    """
    kept = memory.nodes.kept_by(ranks.rank)
    keeper = memory.nodes.keepers[ranks.rank] if memory.nodes.keepers else None
    for start in range(0, max(sizes[rank] for rank in (ranks.rank, *kept)), BLOCK_BYTES):
        length = {rank: min(BLOCK_BYTES, sizes[rank] - start) for rank in (ranks.rank, *kept)}
        waiting = []
        if keeper is not None and length[ranks.rank] > 0:
            block = torch.empty(length[ranks.rank], dtype=torch.uint8)
            with failure.caught(), (temporary_dir / rank_file_name(ranks.rank)).open("rb") as file:
                file.seek(start)
                file.readinto(tensor_bytes(block))
            waiting.append(dist.isend(block, keeper, group=ranks.group))
        incoming = {rank: torch.empty(length[rank], dtype=torch.uint8) for rank in kept if length[rank] > 0}
        waiting += [dist.irecv(copy, rank, group=ranks.group) for rank, copy in incoming.items()]
        for work in waiting:
            assert work is not None, "every rank belongs to the group"
            work.wait()
        for rank, copy in incoming.items():
            with failure.caught(), make_place(temporary_dir, rank_file_name(rank)).open("ab") as file:
                file.write(tensor_bytes(copy))
