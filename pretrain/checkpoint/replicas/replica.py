"""Write a replica: the files of a checkpoint in the memory of two nodes, complete on all of them before an older one goes.

1. The first rank of each node removes leftovers and makes `step-N.tmp` in its folder.
2. Each rank writes its file there, as for a checkpoint on the disk, and sends it to the rank of the next node that keeps it.
3. When all have what they should, rank 0 joins the reports into the manifest, and each node commits: `step-N`.
4. When all nodes have committed, each removes what is older.

Killed before the last of them commits, the older generation is whole on all nodes; killed after, the new one is. What fails
on a node (memory that others filled) is a warning on all ranks and leaves the older generation, because the checkpoints on
the disk stand; a rank that is lost ends the run as anywhere else.

Bring the newest replica that is whole back to the disk, as an ordinary checkpoint, before a start loads one.

From there it is loaded like any other: everything that a resume checks is checked, any layout and any number of nodes may
continue, the launcher sees that the run came further, and the state is durable again before the memory is given up.
Each file is copied by a rank of a node that has it, with its digest compared on the way; one that is damaged comes from
the other node. A replica of which no whole set is left is passed over, for an older generation or for the disk, and
said to be.
"""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist

from amfm.data_pipeline.durable.files import make_folders, try_to_delete
from amfm.data_pipeline.store.node_cache import own_folder
from amfm.pretrain.checkpoint.commit import (
    TEMPORARY_NAME,
    RankFailure,
    commit,
    discard,
    make_temporary,
    remove_temporary,
)
from amfm.pretrain.checkpoint.files import file_names_by_rank, make_place, replace_text, write_tensors
from amfm.pretrain.checkpoint.manifest_file import (
    MANIFEST_NAME,
    checkpoint_name,
    list_checkpoints,
    rank_file_name,
    read_manifest,
    step_of,
)
from amfm.pretrain.checkpoint.reader import JoinedReports, complete_manifest
from amfm.pretrain.checkpoint.remote import commit_fetched, copy_verified
from amfm.pretrain.checkpoint.replicas.memory import Generation, NodeMemory, find_holders, share_out
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


def recover(memory: NodeMemory, checkpoints_dir: Path, read_token: Callable[[], object], ranks: RankGroup) -> None:
    """Make the newest whole replica beyond the disk's checkpoints one of them; `memory.remarks` hear of it, or why not.

    read_token: reads the token of the start before, None if there was none; then nothing happens. All ranks must call it.
    Raises RuntimeError on all of them when the disk does not take it: the memory stays, and the next start tries again.
    """
    problem, token, newest = RankFailure(), None, -1
    if ranks.rank == 0:
        with problem.caught():
            token = read_token()
            newest = max(map(step_of, list_checkpoints(checkpoints_dir)), default=-1)
    ranks.raise_together(problem.text, f"{checkpoints_dir.parent} does not state who wrote the replicas")
    token, newest = ranks.broadcast((token, newest))
    if not isinstance(token, str) or not re.fullmatch("[0-9a-f]{32}", token):
        return
    own: dict[int, Generation] = {}
    damages: list[str] = []
    if memory.leads:
        with problem.caught():
            own, damages = memory.list_generations(token, newest)
        damages += [] if problem.text is None else [problem.text]
    told = ranks.all_gather((own, damages))
    memory.remarks += [text for _, texts in told for text in texts]
    held = {node: told[members[0]][0] for node, members in enumerate(memory.nodes.members)}
    for step in sorted({step for generations in held.values() for step in generations}, reverse=True):
        # One start writes a step once, so that manifests agree; what disagrees with the first node's counts as lost.
        found = {node: generations[step] for node, generations in held.items() if step in generations}
        first = next(iter(found.values()))
        alike = {node: entry for node, entry in found.items() if entry.sha256 == first.sha256}
        reason = fetch(memory, checkpoints_dir, token, step, alike, ranks)
        if reason is None:
            memory.remarks.append(f"step {step} comes from the memory of {len(alike)} of {len(held)} nodes")
            return
        memory.remarks.append(f"the replica of step {step} is passed over: {reason}")
    memory.remarks.append(f"no whole replica beyond step {max(0, newest)} in the memory of {len(held)} nodes")


def fetch(
    memory: NodeMemory,
    checkpoints_dir: Path,
    token: str,
    step: int,
    found: Mapping[int, Generation],
    ranks: RankGroup,
) -> str | None:
    """Copy one replica to the disk; returns why it cannot be had, None when it stands there. All ranks must call it."""
    first_node, entry = next(iter(found.items()))  # every node has the manifest; this one's is copied
    holders = find_holders(entry.num_files, {node: generation.held for node, generation in found.items()})
    name, problem = checkpoint_name(step), RankFailure()
    source_dir, temporary_dir = memory.directory(token) / name, checkpoints_dir
    lacking = [file for file, nodes in holders.items() if not nodes]
    if lacking:
        return f"{len(lacking)} of {entry.num_files} files are on none of the nodes, the first {rank_file_name(lacking[0])}"
    if ranks.rank == 0:
        with problem.caught():
            make_folders(checkpoints_dir)
            remove_temporary(checkpoints_dir)
            temporary_dir = make_temporary(checkpoints_dir, step)
    doing = f"the replica of step {step} was not copied to {checkpoints_dir}"
    ranks.raise_together(problem.text, doing)
    temporary_dir = checkpoints_dir / ranks.broadcast(temporary_dir.name)
    if memory.node == first_node and memory.leads:
        with problem.caught():
            replace_text(temporary_dir / MANIFEST_NAME, (source_dir / MANIFEST_NAME).read_text(encoding="utf-8"))
    damages: dict[int, str] = {}
    while holders and all(holders.values()):
        chosen = share_out(holders, memory.nodes)
        own = [file for file, (_, rank) in chosen.items() if rank == ranks.rank]
        wrong: dict[int, str] = {}
        with problem.caught():
            wrong = copy_files(own, source_dir, temporary_dir)
        told = ranks.all_gather((problem.text, wrong))
        if any(text is not None for text, _ in told):
            break
        damages = {file: text for _, texts in told for file, text in texts.items()}
        memory.remarks += damages.values()
        holders = {file: [node for node in holders[file] if node != chosen[file][0]] for file in damages}
    texts = list(damages.values()) if ranks.rank == 0 else []
    return commit_fetched(temporary_dir, name, texts, problem, ranks, doing)


def copy_files(files: list[int], source_dir: Path, temporary_dir: Path) -> dict[int, str]:
    """Copy files of ranks; returns what is damaged, by rank of the file. Raises OSError if the disk does not take them."""
    manifest = read_manifest(source_dir) if files else {"files": {}}
    names, damages = file_names_by_rank(manifest), {}
    for file in files:
        name = names[file]
        with (source_dir / name).open("rb") as source:
            place = make_place(temporary_dir, name)
            damage = copy_verified(source, place, str(source_dir / name), manifest["files"][name])
        if damage is not None:
            damages[file] = damage
    return damages
