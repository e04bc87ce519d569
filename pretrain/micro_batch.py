"""A micro-batch on its way from the loader into the model, and what its loss adds to the step's.

Tensor, context and pipeline ranks of a data rank read the same batch. Of several context ranks each
keeps two segments of every row, cut on the CPU before the copy, so that a device never holds what another one computes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import overload

import torch
from torch import Tensor

from amfm.data_pipeline.batch import Batch
from amfm.model.config.schema import ModelConfig
from amfm.model.hybrid import ModelOutput
from amfm.model.mtp import Ahead
from amfm.model.packing import PackMeta, Padding
from amfm.pretrain.parallel import Parallel


@dataclass(frozen=True)
class MicroBatch:
    """The model's input: tokens and labels [B, T of this context rank], and where documents begin.

    ahead: what each MTP layer reads and learns.
    """

    tokens_BT: Tensor
    labels_BT: Tensor
    meta: PackMeta
    ahead: tuple[Ahead, ...] = ()

    @classmethod
    def from_batch(
        cls, batch: Batch, rank: int, num_ranks: int, num_depths: int = 0, *, two_batch: bool = False
    ) -> MicroBatch:
        """Cut out what one of `num_ranks` context ranks has of a batch of the loader, on the CPU like the batch.

        The loader has counted the documents, so that nothing is searched for here. Raises ValueError if rows cannot
        be cut evenly. two_batch: both halves of the rows alternate through the blocks.
        """
        ahead, lengths_B = shift_batch(batch, num_depths), batch.lengths_B
        meta = PackMeta(
            document_ids_BT=batch.document_ids_BT,
            positions_BT=batch.positions_BT,
            single_document=batch.num_documents == len(batch.tokens_BT),
            padding=None if lengths_B is None else Padding.of_lengths(lengths_B, batch.tokens_BT.shape[1]),
        ).cut(rank, num_ranks)
        if two_batch:
            meta = meta.with_halves()
        if meta.segments is None:
            return cls(batch.tokens_BT, batch.labels_BT, meta, ahead)
        take = meta.segments.take
        own_ahead = tuple(given.map_tensors(take) for given in ahead)
        return cls(take(batch.tokens_BT), take(batch.labels_BT), meta, own_ahead)

    def to(self, device: torch.device) -> MicroBatch:
        """Copy to a device. Copies to CUDA go through pinned memory and do not wait for what is queued there.

        Kernels on CUDA want to know where documents begin and end, which is found here, once for all blocks.
        """
        found = replace(self, meta=self.meta.find_bounds()) if device.type == "cuda" else self
        moved = found.map_tensors(lambda tensor: send(tensor, device))
        return replace(moved, meta=moved.meta.with_tokens(moved.tokens_BT))

    def map_tensors(self, change: Callable[[Tensor], Tensor]) -> MicroBatch:
        """Apply a function to every tensor."""
        ahead = tuple(given.map_tensors(change) for given in self.ahead)
        return MicroBatch(change(self.tokens_BT), change(self.labels_BT), self.meta.map_tensors(change), ahead)


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor of the host to a device, on CUDA through pinned memory and without waiting for its queue."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def shift_batch(batch: Batch, num_depths: int) -> tuple[Ahead, ...]:
    """Shift the batch's rows, once for each MTP layer; empty without depths."""
    rows = batch.tokens_BT, batch.labels_BT, batch.document_ids_BT
    return tuple(Ahead.of_rows(*rows, depth) for depth in range(1, num_depths + 1))


def move_batch(batch: Batch, parallel: Parallel, model: ModelConfig, *, two_batch: bool = False) -> MicroBatch:
    """Prepare a batch of the loader for this rank: cut for its place in the context group, and copied to its device."""
    group = parallel.groups.cp
    own = MicroBatch.from_batch(batch, group.rank(), group.size(), model.num_depths, two_batch=two_batch)
    return own.to(parallel.device)


class MicroBatches(Sequence[MicroBatch]):
    """The micro-batches of a step, each prepared for this rank when it is first asked for.

    By then the one before it is queued: a GPU computes that one while the host finds documents, cuts and fills pinned
    memory for this one, and its first product waits for one micro-batch instead of for all of a step. On a CPU the
    order is the same.
    """

    def __init__(self, batches: Sequence[Batch], parallel: Parallel, model: ModelConfig) -> None:
        self.batches = batches
        self._move = partial(move_batch, parallel=parallel, model=model, two_batch=parallel.groups.two_batch)
        self._ready: list[MicroBatch] = []

    def __len__(self) -> int:
        return len(self.batches)

    @overload
    def __getitem__(self, number: int) -> MicroBatch: ...
    @overload
    def __getitem__(self, number: slice) -> list[MicroBatch]: ...
    def __getitem__(self, number: int | slice) -> MicroBatch | list[MicroBatch]:
        """The micro-batch of a number, those before it prepared too; of a slice a list."""
        if isinstance(number, slice):
            return [self[each] for each in range(*number.indices(len(self)))]
        for batch in self.batches[len(self._ready) : range(len(self))[number] + 1]:
            self._ready.append(self._move(batch))
        return self._ready[number]


@dataclass(frozen=True)
class LossShare:
    """Turns a micro-batch's sums into its share of the step's loss; gradients of all shares are then summed.

    The loss is a sum over tokens divided by the global batch's valid tokens, and so is that of each
    MTP layer by its own, of whose mean a weighted part is taken (`mtp_factors`, a number a depth); each
    auxiliary loss is a mean over its micro-batches, of all data ranks. The numbers are on the device: the host need not
    know them.
    """

    valid_tokens: Tensor
    num_micro_batches: int
    mtp_factors: tuple[Tensor, ...] = ()

    @classmethod
    def of_counts(cls, counts: Tensor, num_micro_batches: int, model: ModelConfig) -> LossShare:
        """The shares of a step with these valid tokens, of the main loss and of each depth; none divides by 0."""
        valid_tokens, *ahead = counts.clamp(min=1)
        weight = model.prediction.loss_weight / max(1, len(ahead))
        factors = tuple((weight / tokens.double()).float() for tokens in ahead)
        return cls(valid_tokens.float(), num_micro_batches, factors)

    def apply(self, output: ModelOutput) -> Tensor | None:
        """Compute the share of an output; None when it has neither a loss nor an auxiliary one."""
        parts = [value / self.num_micro_batches for value in output.auxiliary.values()]
        if output.loss is not None:
            parts.insert(0, output.loss.total / self.valid_tokens)
        parts += [loss.total * factor for loss, factor in zip(output.mtp, self.mtp_factors)]
        return sum(parts[1:], parts[0]) if parts else None
