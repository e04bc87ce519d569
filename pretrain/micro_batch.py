"""A micro-batch on its way from the loader into the model, and what its loss adds to the step's.

Tensor, context and pipeline ranks of a data rank read the same batch. Of several context ranks each
keeps two segments of every row, cut on the CPU before the copy, so that a device never holds what another one computes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from data_pipeline.batch import Batch
from model.hybrid import ModelOutput
from model.packing import PackMeta
from pretrain.parallel import Parallel


@dataclass(frozen=True)
class MicroBatch:
    """The model's input: tokens and labels [B, T of this context rank], and where documents begin."""

    tokens_BT: Tensor
    labels_BT: Tensor
    meta: PackMeta

    @classmethod
    def from_batch(cls, batch: Batch, rank: int, num_ranks: int) -> MicroBatch:
        """Cut out what one of `num_ranks` context ranks has of a batch of the loader, on the CPU like the batch.

        The loader has counted the documents, so that nothing is searched for here. Raises ValueError where rows cannot
        be cut evenly.
        """
        meta = PackMeta(
            document_ids_BT=batch.document_ids_BT,
            positions_BT=batch.positions_BT,
            single_document=batch.num_documents == len(batch.tokens_BT),
        ).cut(rank, num_ranks)
        if meta.segments is None:
            return cls(batch.tokens_BT, batch.labels_BT, meta)
        return cls(meta.segments.take(batch.tokens_BT), meta.segments.take(batch.labels_BT), meta)

    def to(self, device: torch.device) -> MicroBatch:
        """Copy to a device. Copies to CUDA go through pinned memory and do not wait for what is queued there.

        Kernels on CUDA want to know where documents begin and end, which is found here, once for all blocks.
        """
        if device.type == "cuda":
            prepared = MicroBatch(self.tokens_BT, self.labels_BT, self.meta.find_bounds())
            return prepared.map_tensors(lambda tensor: tensor.pin_memory().to(device, non_blocking=True))
        return self.map_tensors(lambda tensor: tensor.to(device))

    def map_tensors(self, change: Callable[[Tensor], Tensor]) -> MicroBatch:
        """Apply a function to every tensor."""
        return MicroBatch(change(self.tokens_BT), change(self.labels_BT), self.meta.map_tensors(change))


def move_batch(batch: Batch, parallel: Parallel) -> MicroBatch:
    """Prepare a batch of the loader for this rank: cut for its place in the context group, and copied to its device."""
    group = parallel.groups.cp
    return MicroBatch.from_batch(batch, group.rank(), group.size()).to(parallel.device)


@dataclass(frozen=True)
class LossShare:
    """Turns a micro-batch's sums into its share of the step's loss; gradients of all shares are then summed.

    The loss is a sum over tokens divided by the global batch's valid tokens; each auxiliary loss is a mean over its
    micro-batches, of all data ranks.
    """

    valid_tokens: int
    num_micro_batches: int

    def of(self, output: ModelOutput) -> Tensor | None:
        """Compute the share of an output; None when it has neither a loss nor an auxiliary one."""
        parts = [value / self.num_micro_batches for value in output.auxiliary.values()]
        if output.loss is not None:
            parts.insert(0, output.loss.total / self.valid_tokens)
        return sum(parts[1:], parts[0]) if parts else None
