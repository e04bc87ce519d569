"""Saving while training goes on: the step waits for a copy in memory, a thread writes and commits it."""

from __future__ import annotations

import copy
import dataclasses
import datetime
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch.distributed as dist

from pretrain.checkpoint import Snapshot, agreement_of, take_snapshot, write_snapshot
from pretrain.checkpoint_commit import Agreement
from pretrain.config import RunConfig
from pretrain.engine import ZeroEngine


class BackgroundSaver:
    """Writes one checkpoint at a time in a thread of its own; the guarantees are those of `save_checkpoint`.

    The thread talks to the other ranks over its own gloo group, so that its messages never mix with training's. A save
    that fails raises, on every rank alike, at the next `save` or `wait`. All ranks must make one and call its methods
    in the same order.
    """

    def __init__(self, engine: ZeroEngine, timeout_seconds: float) -> None:
        everyone = agreement_of(engine)
        timeout = datetime.timedelta(seconds=timeout_seconds)
        group = dist.new_group(backend="gloo", timeout=timeout) if everyone.world_size > 1 else None
        self.ranks = Agreement(everyone.rank, everyone.world_size, group)
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self.pending: Future[Path] | None = None

    def save(
        self,
        checkpoints_dir: Path,
        step: int,
        engine: ZeroEngine,
        *,
        state: dict[str, Any],
        config: RunConfig,
        identities: dict[str, str],
        keep_last: int,
    ) -> Path | None:
        """Copy the state as it is now and begin to write it; returns the folder of the save before, if one was pending.

        Waits for the save before, so that memory holds one copy at most. Arguments as for `save_checkpoint`.
        """
        finished = self.wait()
        snapshot = take_snapshot(step, engine, self.ranks, state=state, config=config, identities=identities)
        self.pending = self.thread.submit(
            write_snapshot, checkpoints_dir, copy_snapshot(snapshot), self.ranks, keep_last
        )
        return finished

    def wait(self) -> Path | None:
        """Return when nothing is being written any more: the folder of the save that was pending, or None.

        Raises RuntimeError when that save failed.
        """
        pending, self.pending = self.pending, None
        return None if pending is None else pending.result()

    def close(self) -> None:
        """Let a pending save end, well or badly, and end the thread; for the way out of a run that failed itself."""
        self.thread.shutdown(wait=True)


def copy_snapshot(snapshot: Snapshot) -> Snapshot:
    """The same values in memory that no later step touches, on the CPU."""
    return dataclasses.replace(
        snapshot,
        fragments=[dataclasses.replace(fragment, tensors={}) for fragment in snapshot.fragments],
        tensors={key: tensor.detach().to("cpu", copy=True) for key, tensor in snapshot.tensors.items()},
        manifest=copy.deepcopy(snapshot.manifest),
    )
