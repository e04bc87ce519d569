"""One micro-batch as the model takes it, and what its loss adds to the step's."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from data_pipeline.batch import Batch
from model.hybrid import ModelOutput
from model.packing import PackMeta
from pretrain.parallel import Parallel


@dataclass(frozen=True)
class MicroBatch:
    """The model's input on its device: tokens and labels [B, T of this context rank], and where documents begin."""

    tokens_BT: Tensor
    meta: PackMeta
    labels_BT: Tensor


def move_batch(batch: Batch, parallel: Parallel) -> MicroBatch:
    """This rank's part of a batch of the loader, on the device that computes; context ranks cut its rows."""
    device, group = parallel.device, parallel.groups.cp
    tokens_BT, labels_BT = batch.tokens_BT.to(device), batch.labels_BT.to(device)
    meta = PackMeta.from_document_ids(batch.document_ids_BT.to(device), batch.positions_BT.to(device))
    meta = meta.cut(group.rank(), group.size())
    if meta.segments is not None:
        tokens_BT, labels_BT = meta.segments.take(tokens_BT), meta.segments.take(labels_BT)
    return MicroBatch(tokens_BT, meta, labels_BT)


@dataclass(frozen=True)
class LossShare:
    """How a micro-batch's sums become its share of the step's loss, whose gradients are then summed over all of them.

    The loss is a sum over tokens divided by the global batch's valid tokens; each auxiliary loss is a mean over its
    micro-batches, of all data ranks.
    """

    valid_tokens: int
    num_micro_batches: int

    def of(self, output: ModelOutput) -> Tensor | None:
        """The share of what is in the output; None when there is neither a loss nor an auxiliary one."""
        parts = [value / self.num_micro_batches for value in output.auxiliary.values()]
        if output.loss is not None:
            parts.insert(0, output.loss.total / self.valid_tokens)
        return sum(parts[1:], parts[0]) if parts else None
