"""The choices of experts that each token made, written to files of the run (section `trace_choices`).

A file `choices/step-00000012/rank-00003.safetensors` for each rank that holds routers and is the first of its tensor ranks:

    tokens          int32 [B, T]        the rank's rows of the step, micro-batch after micro-batch; of context ranks their part
    blocks.INDEX    int16 [B, T, K]     experts, best first, of the block of that index in the pattern (int32 above 32,767 experts)

Padding has choices too, which are not routed. Blocks of multi-token prediction are left out. `read_choices` gives what a model's
`PackMeta.choices` replays.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from amfm.pretrain.checkpoint.files import measure_tensors, write_tensors
from amfm.pretrain.config.hook_sections import TraceConfig
from amfm.pretrain.hook import Hook
from amfm.pretrain.micro_batch import LossShare, MicroBatch
from amfm.pretrain.run import Run
from amfm.pretrain.stages import is_due
from amfm.pretrain.step_sums import StepResult
from amfm.pretrain.tensor_files import TensorFile

FOLDER = "choices"


class TraceChoices(Hook):
    """Collects choices of the passes of a step, and writes them after it; each rank keeps to an equal share of the size."""

    def __init__(self, options: TraceConfig, run: Run) -> None:
        self.options, self.run = options, run
        self.rank, num_ranks = run.engine.deepspeed.global_rank, run.engine.deepspeed.world_size
        self.max_bytes = int(options.max_mebibytes * 2**20) // num_ranks
        self.micro_batches: Sequence[MicroBatch] = ()
        self.chosen: dict[int, list[Tensor]] = {}
        main = set(run.model.blocks.indices())
        self.mixers: dict[int, Any] = {
            index: module
            for index, block in run.model.all_blocks()
            for module in block.modules()
            if index in main and hasattr(module, "note_choices")
        }
        if run.parallel.groups.tp.rank() != 0:
            self.mixers = {}

    def before_passes(self, micro_batches: Sequence[MicroBatch], share: LossShare) -> None:
        """Listen, where the coming step is written; passes that are taken again start over."""
        self.chosen = {index: [] for index in self.mixers}
        if is_due(self.run.progress.step + 1, self.options.every_steps):
            self.micro_batches = micro_batches
            for index, mixer in self.mixers.items():
                mixer.note_choices = partial(self._note, index)

    def _note(self, index: int, choices_RK: Tensor) -> None:
        """Keep what a forward pass chose; one that recomputes inside a backward pass chooses the same."""
        if torch._C._current_graph_task_id() == -1:
            kind = (
                torch.int16 if self.mixers[index].section.num_experts <= torch.iinfo(torch.int16).max else torch.int32
            )
            self.chosen[index].append(choices_RK.to(kind))

    def after_step(self, result: StepResult) -> None:
        """Write the step that was listened to."""
        if not self.micro_batches:
            return
        micro_batches, self.micro_batches = self.micro_batches, ()
        for mixer in self.mixers.values():
            mixer.note_choices = None
        if self.mixers:
            tokens_BT = torch.cat([each.tokens_BT for each in micro_batches]).int().cpu()
            blocks = {
                f"blocks.{index}": torch.cat(chosen).cpu().unflatten(0, tokens_BT.shape)
                for index, chosen in self.chosen.items()
            }
            self._write({"tokens": tokens_BT, **blocks})
        self.chosen = {}

    def _write(self, tensors: dict[str, Tensor]) -> None:
        """Write a file in the room that there is: of a step that is larger than all of it, the first rows."""
        folder = self.run.directory / FOLDER / f"step-{self.run.progress.step:08d}"
        path, metadata = folder / f"rank-{self.rank:05d}.safetensors", {"step": str(self.run.progress.step)}
        rows = len(tensors["tokens"])
        empty = measure_tensors({key: value[:0] for key, value in tensors.items()}, metadata)
        row_bytes = sum(value[0].nbytes for value in tensors.values())
        fitting = min(rows, max(0, self.max_bytes - empty) // row_bytes)
        if not fitting:
            return
        kept = {key: value[:fitting].contiguous() for key, value in tensors.items()}
        self._drop_oldest(measure_tensors(kept, metadata))
        folder.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.unlink(missing_ok=True)
        write_tensors(temporary, kept, metadata)
        os.replace(temporary, path)

    def _drop_oldest(self, num_bytes: int) -> None:
        """Remove this rank's oldest files until so many bytes more fit."""
        own = sorted((self.run.directory / FOLDER).glob(f"step-*/rank-{self.rank:05d}.safetensors"))
        sizes = [path.stat().st_size for path in own]
        while own and sum(sizes) + num_bytes > self.max_bytes:
            path = own.pop(0)
            sizes.pop(0)
            path.unlink()
            if not any(path.parent.iterdir()):
                path.parent.rmdir()


def read_choices(path: str | Path) -> tuple[Tensor, dict[int, Tensor]]:
    """Read a file: tokens [B, T], and the choices [B, T, K] of each block by its index, all int64.

    Raises RuntimeError for a damaged file, OSError for one that is not there.
    """
    file = TensorFile(Path(path), RuntimeError)
    found = {key: file.numbers(key, 0, stored.numel).view(stored.shape).long() for key, stored in file.tensors.items()}
    file.close()
    blocks = {int(key.removeprefix("blocks.")): value for key, value in found.items() if key != "tokens"}
    return found["tokens"], blocks
