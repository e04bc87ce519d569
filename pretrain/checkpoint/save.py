"""Durable checkpoints: the state of a training run is saved as a whole or not at all.

The commit protocol, for step N. Every rank takes part:

1. Each rank takes a snapshot: views of the ranges of float32 master weights and moments that it writes (engine_layout.py chooses one
   writer for every shard), its buffers and its random state. The background saver copies the views, so that training may
   continue.
2. Rank 0 removes what interrupted saves left, checks the free space for all, and makes the folder `step-N.tmp`.
3. Each rank writes one safetensors file into it, computing SHA-256 on the way, syncs it to the disk, and reports what it
   wrote. NaN in a tensor is an error: a broken state must not replace a good one.
4. If any rank failed, rank 0 removes the folder and all ranks raise the same error. Older checkpoints were not touched.
5. Else rank 0 joins the reports into the manifest, asserts that the ranges cover every parameter exactly, and renames
   `step-N.tmp` to `step-N` (commit.py). The rename is the commit: before it there is no checkpoint, after it a whole one.
6. Only then are older checkpoints pruned.

So a kill at any moment leaves every folder called `step-N` whole. Loading (load.py) trusts digests and not names, and falls
back to the one before.
"""

from __future__ import annotations

import dataclasses
import datetime
import operator
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from amfm.data_pipeline.durable.files import make_folders, try_to_delete
from amfm.pretrain.checkpoint.commit import (
    TEMPORARY_NAME,
    RankFailure,
    SavedCheckpoint,
    check_free_space,
    commit,
    make_temporary,
    mark,
    remove_older,
    remove_temporary,
)
from amfm.pretrain.checkpoint.compatibility import digest_config
from amfm.pretrain.checkpoint.engine_layout import EngineLayout, WriterAssignment, assign_writers
from amfm.pretrain.checkpoint.files import (
    FileEntry,
    collect_random_state,
    make_place,
    measure_tensors,
    sync_folders,
    write_tensors,
)
from amfm.pretrain.checkpoint.fragments import collect_fragments, collect_group_settings
from amfm.pretrain.checkpoint.manifest_file import EVERY, checkpoint_name, rank_file_name
from amfm.pretrain.checkpoint.placement import list_axes
from amfm.pretrain.checkpoint.reader import JoinedReports, RankReport, complete_manifest, describe_tensor
from amfm.pretrain.checkpoint.remote import RemoteCheckpoints
from amfm.pretrain.config.saved import packages_used
from amfm.pretrain.config.schema import RunConfig
from amfm.pretrain.engine.adamw import AVERAGE
from amfm.pretrain.engine.engine import ZeroEngine
from amfm.pretrain.packages import collect_versions
from amfm.pretrain.ranks.group import RankGroup

# Room for the manifest, directories and the `latest` file, beyond the tensors.
SPARE_BYTES = 1 << 20
ENGINE_COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")


@dataclass(frozen=True)
class Snapshot:
    """Everything that this rank writes for one step: tensors by key, its report, and the manifest's part known beforehand."""

    step: int
    tensors: dict[str, Tensor]
    report: RankReport
    manifest: dict[str, Any]
    marked: bool

    def metadata(self) -> dict[str, str]:
        """Metadata of the rank's safetensors file."""
        return {"format": "pt", "step": str(self.step)}


def save_checkpoint(
    checkpoints_dir: Path,
    step: int,
    engine: ZeroEngine,
    *,
    state: dict[str, Any],
    config: RunConfig,
    identities: dict[str, str],
    keep_last: int,
) -> SavedCheckpoint:
    """Save everything that an exact resume needs as `checkpoints_dir/step-N`, and prune to `keep_last` checkpoints.

    All ranks must call it, at a step boundary (no gradients pending), with the same `state` (JSON: data cursor,
    counters). Raises RuntimeError on every rank when any rank fails (disk full, read-only folder, NaN in a tensor):
    then the temporary folder is gone and older checkpoints are untouched. Returns once the folder is durable; whatever cannot
    be cleared away after that is a warning.
    """
    ranks = ranks_of(engine)
    layout = EngineLayout.of(engine)
    writers = assign_writers(layout, ranks)
    snapshot = take_snapshot(step, layout, ranks, writers, state=state, config=config, identities=identities)
    return write_snapshot(checkpoints_dir, snapshot, ranks, keep_last)


def ranks_of(engine: ZeroEngine) -> RankGroup:
    """Build the group of ranks that save and load this engine's checkpoints together: all of them."""
    return RankGroup(engine.deepspeed.global_rank, engine.deepspeed.world_size)


def take_snapshot(
    step: int,
    layout: EngineLayout,
    ranks: RankGroup,
    writers: WriterAssignment,
    *,
    state: dict[str, Any],
    config: RunConfig,
    identities: dict[str, str],
) -> Snapshot:
    """Collect views of the state that this rank writes (step 1 of the protocol). Communicates nothing.

    The tensors alias master weights and moments: the next optimizer step changes them, so write or copy them before it.
    """
    engine = layout.engine
    held = [
        fragment
        for fragment in [
            *collect_fragments(engine.deepspeed, layout.parts, layout.averages),
            *layout.frozen_fragments(),
        ]
        if fragment.name in writers.parameters
    ]
    fragments = [share for share in (fragment.share(ranks.rank) for fragment in held) if share is not None]
    buffers = {name: buffer for name, buffer in layout.buffers().items() if name in writers.buffers}
    # Frozen weights and states in bf16 widen here, on the host: all that a checkpoint has of parameters is float32.
    tensors = {
        f"{kind}/{part.name}/{part.start}": tensor if tensor.dtype == torch.float32 else tensor.cpu().float()
        for part in fragments
        for kind, tensor in part.tensors.items()
    }
    tensors |= {f"buffer/{name}": buffer.detach() for name, buffer in buffers.items()}
    tensors |= {f"random/{name}": tensor for name, tensor in collect_random_state().items()}
    report = RankReport(
        parameters={
            part.name: {
                **describe_tensor(layout.placements[part.name].whole, layout.dtypes[part.name]),
                "group": part.group,
                "optimizer_step": part.optimizer_step,
                **({"averaged": True} if AVERAGE in part.tensors else {}),
            }
            for part in fragments
        },
        shards={
            part.name: {"where": layout.placements[part.name].to_json(), "coordinates": layout.coordinates[part.name]}
            for part in fragments
        },
        ranges=[(part.name, part.start, part.numel) for part in fragments],
        buffers={name: describe_tensor(buffer.shape, buffer.dtype) for name, buffer in buffers.items()},
        groups=collect_group_settings(engine.deepspeed),
    )
    manifest = {
        "step": step,
        "saved_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "layout": {
            "world_size": ranks.world_size,
            "axes": list_axes(engine.groups),
            "zero_stage": engine.zero_stage,
            "precision": config.train.precision,
        },
        "identities": identities,
        "config_sha256": digest_config(config),
        "config": config.model_dump(mode="json"),
        "packages": packages_used(config),
        "state": state,
        "engine": {name: int(getattr(engine.deepspeed, name)) for name in ENGINE_COUNTERS},
        "versions": collect_versions(),
    }
    keep_every = config.train.keep_every_steps
    return Snapshot(step, tensors, report, manifest, marked=keep_every is not None and step % keep_every == 0)


def write_snapshot(
    checkpoints_dir: Path,
    snapshot: Snapshot,
    ranks: RankGroup,
    keep_last: int,
    *,
    fence: Callable[[], None] | None = None,
    remote: RemoteCheckpoints | None = None,
) -> SavedCheckpoint:
    """Write, report, commit and prune (steps 2 to 6). All ranks must call it; raises as `save_checkpoint` says.

    `fence`: called by rank 0 before it touches the folder and again before the commit; what it raises fails the save.
    `remote`: gets a copy after the commit, on all ranks or none.
    """
    doing = f"checkpoint of step {snapshot.step} in {checkpoints_dir} was not saved"
    needed_bytes = ranks.merge_to_first(measure_tensors(snapshot.tensors, snapshot.metadata()), operator.add)
    problem = RankFailure()
    remarks: list[str] = []
    temporary_dir = checkpoints_dir
    if ranks.rank == 0:
        with problem.caught():
            if fence is not None:
                fence()
            make_folders(checkpoints_dir)
            remarks += remove_temporary(checkpoints_dir)
            check_free_space(checkpoints_dir, (needed_bytes or 0) + SPARE_BYTES)
            temporary_dir = make_temporary(checkpoints_dir, snapshot.step)
    # Raised on all ranks or none: one that left on its own would leave the others in a collective.
    ranks.raise_together(problem.text, doing)
    # Rank 0 chose the name, which is another one where a leftover could not be deleted.
    temporary_dir = checkpoints_dir / ranks.broadcast(temporary_dir.name)

    file: FileEntry | None = None
    with problem.caught():
        path = make_place(temporary_dir, rank_file_name(ranks.rank))
        file = write_tensors(path, snapshot.tensors, snapshot.metadata())
    all_written = not ranks.collect(problem.text)
    joined = None
    if all_written:
        report = dataclasses.replace(snapshot.report, file=file)
        joined = ranks.merge_to_first(JoinedReports.of(ranks.rank, report), JoinedReports.joined)
    saved = SavedCheckpoint(checkpoints_dir / checkpoint_name(snapshot.step))
    if ranks.rank == 0:
        if joined is not None:
            with problem.caught():
                # Marked before the rename, so that no pruning can meet the checkpoint without its mark.
                if snapshot.marked:
                    mark(temporary_dir, EVERY)
                sync_folders(temporary_dir)
                if fence is not None:
                    fence()
                saved = commit(temporary_dir, complete_manifest(snapshot.manifest, joined))
                remarks += [*saved.remarks, *remove_older(checkpoints_dir, snapshot.step, keep_last)]
        # Still there only after a failure, on any rank; no one leaves before it is gone, or cannot be.
        remarks += try_to_delete(temporary_dir, TEMPORARY_NAME)
    ranks.raise_together(problem.text, doing)
    if remote is not None:
        remarks += remote.push(saved.path, ranks, keep_last)
    return dataclasses.replace(saved, remarks=tuple(remarks))
