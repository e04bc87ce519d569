"""Background saving: the step waits for a copy in memory, and a thread writes and commits it while training continues.

A step that is saved costs training one copy of the state to host memory; hashing, writing, syncing and the messages between
ranks happen in the thread. One save is in flight at most: the next one waits for it, so memory holds one copy. A save that
fails cannot raise inside the thread that trains, so its error is kept and raised by `wait`, which all ranks call at the same
step and therefore fail together: the loop agrees after every step on whether any rank `is_writing`.
"""

from __future__ import annotations

import copy
import dataclasses
import datetime
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from amfm.pretrain.checkpoint.commit import SavedCheckpoint
from amfm.pretrain.checkpoint.engine_layout import EngineLayout, assign_writers
from amfm.pretrain.checkpoint.files import measure_tensors
from amfm.pretrain.checkpoint.remote import RemoteCheckpoints, SentCopy, step_named
from amfm.pretrain.checkpoint.replicas.memory import NodeMemory
from amfm.pretrain.checkpoint.replicas.replica import SavedReplica, write_replica
from amfm.pretrain.checkpoint.save import Snapshot, ranks_of, take_snapshot, write_snapshot
from amfm.pretrain.config.schema import RunConfig
from amfm.pretrain.engine.engine import ZeroEngine
from amfm.pretrain.ranks.group import RankGroup

Saved = SavedCheckpoint | SavedReplica | SentCopy


class BackgroundSaver:
    """Writes one checkpoint at a time in a separate thread; the guarantees are those of `save_checkpoint`.

    The copy stays in memory between saves: 12 bytes for each number whose master weights this rank holds.

    The thread talks to the other ranks over its own gloo group, so that its messages never mix with training's. A save
    that fails raises, on every rank alike, at the next `save` or `wait`. All ranks must make one and call its methods
    in the same order. `fence`: of rank 0, raises RuntimeError when this start may not write any more. `remote`:
    where copies go, `replicas`: the memory of the nodes; on all ranks or none.
    """

    def __init__(self, engine: ZeroEngine, timeout_seconds: float) -> None:
        everyone = ranks_of(engine)
        timeout = datetime.timedelta(seconds=timeout_seconds)
        # Of every rank, so never the number that torch 2.15's annotation allows for ranks outside it.
        group: Any = dist.new_group(backend="gloo", timeout=timeout) if everyone.world_size > 1 else None
        self.ranks = RankGroup(everyone.rank, everyone.world_size, group)
        self.layout = EngineLayout.of(engine)
        self.writers = assign_writers(self.layout, everyone)
        self.remote: RemoteCheckpoints | None = None
        self.replicas: NodeMemory | None = None
        self.fence: Callable[[], None] | None = None
        self.pending: Future[Saved] | None = None
        self.memory: dict[str, Tensor] = {}

    def save(
        self,
        checkpoints_dir: Path,
        step: int,
        *,
        state: dict[str, Any],
        config: RunConfig,
        identities: dict[str, str],
        keep_last: int,
    ) -> Saved | None:
        """Copy the state and start writing it; returns the previous save, if one was pending.

        Waits for the save before, so that memory holds one copy at most. Arguments as for `save_checkpoint`.
        """
        return self._begin(
            self._snapshot(step, state, config, identities),
            lambda own: write_snapshot(
                checkpoints_dir, own, self.ranks, keep_last, fence=self.fence, remote=self.remote
            ),
        )

    def replicate(
        self, step: int, *, state: dict[str, Any], config: RunConfig, identities: dict[str, str]
    ) -> Saved | None:
        """The same into the memory of the nodes (replicas/replica.py)."""
        memory = self.replicas
        assert memory is not None, "replicas are written where the run has them"
        snapshot = self._snapshot(step, state, config, identities)
        return self._begin(snapshot, lambda own: write_replica(memory, own, self.ranks))

    def send(self, checkpoint_dir: Path, keep_last: int) -> Saved | None:
        """Start to send a checkpoint that stands to the store; returns the save before, as `save` does."""
        remote = self.remote
        assert remote is not None, "copies are sent where the run has a store"

        def push() -> SentCopy:
            return SentCopy(step_named(checkpoint_dir.name), tuple(remote.push(checkpoint_dir, self.ranks, keep_last)))

        finished = self.wait()
        self._run(push)
        return finished

    def measure(self, config: RunConfig) -> int:
        """Bytes that this rank writes of each checkpoint."""
        snapshot = self._snapshot(0, {}, config, {})
        return measure_tensors(snapshot.tensors, snapshot.metadata())

    def _snapshot(self, step: int, state: dict[str, Any], config: RunConfig, identities: dict[str, str]) -> Snapshot:
        return take_snapshot(
            step, self.layout, self.ranks, self.writers, state=state, config=config, identities=identities
        )

    def _begin(self, snapshot: Snapshot, write: Callable[[Snapshot], Saved]) -> Saved | None:
        """Wait for the save before, copy the snapshot and start to `write` the copy; returns the save before."""
        finished = self.wait()
        own_snapshot = copy_snapshot(snapshot, self.memory)
        self.memory = own_snapshot.tensors
        self._run(lambda: write(own_snapshot))
        return finished

    def _run(self, work: Callable[[], Saved]) -> None:
        """Do the work in a separate thread, whose result `wait` gives."""
        # A thread for only this save: while one lives that has used OpenMP, its idle workers count as busy processors
        # and every parallel loop of the training thread waits longer (half the speed, measured on two cores).
        writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self.pending = writer.submit(work)
        writer.shutdown(wait=False)

    def is_writing(self) -> bool:
        """Whether this rank's save is still under way; one that ended, well or not, waits for `wait` to tell how."""
        return self.pending is not None and not self.pending.done()

    def wait(self) -> Saved | None:
        """Wait until nothing is being written: returns the save that was pending, or None.

        Raises RuntimeError when that save failed.
        """
        pending, self.pending = self.pending, None
        return None if pending is None else pending.result()

    def close(self) -> None:
        """Let a pending save end, successfully or not; for the way out of a run that failed itself."""
        if self.pending is not None:
            wait_for([self.pending])


def copy_snapshot(snapshot: Snapshot, memory: dict[str, Tensor]) -> Snapshot:
    """Copy a snapshot to CPU memory that no later step touches.

    `memory`: tensors of an earlier copy, overwritten where they fit; new pages cost several times the copy itself. What comes
    from a GPU goes to pinned memory, one after the other, and is waited for once.
    """
    tensors = {}
    on_gpu = False
    for key, tensor in snapshot.tensors.items():
        place = memory.get(key)
        if place is None or place.shape != tensor.shape or place.dtype != tensor.dtype:
            place = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        tensors[key] = place.copy_(tensor.detach(), non_blocking=tensor.is_cuda)
        on_gpu |= tensor.is_cuda
    if on_gpu:
        torch.cuda.current_stream().synchronize()
    return dataclasses.replace(
        snapshot,
        tensors=tensors,
        manifest=copy.deepcopy(snapshot.manifest),
    )
