"""Forward passes over rows that all data ranks share: of a run's engine, of a model on one rank or over several."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from amfm.data_pipeline.loader.loader import batch_of_rows
from amfm.data_pipeline.samples.packing import IGNORED_LABEL, Row
from amfm.model.hybrid import HybridModel, ModelOutput
from amfm.model.parallel.groups import single_rank_groups
from amfm.pretrain.micro_batch import MicroBatch
from amfm.pretrain.parallel import DataParallelUnit, Parallel


@dataclass(frozen=True)
class RowPasses:
    """How rows pass a model in eval mode.

    forward: forward passes of micro-batches, as validation takes them; of a pipeline the outputs of other pieces than the
    last have no loss. rows_at_once: of a micro-batch; as_in_training: never fewer, for compiled blocks and schedules.
    micro_batches: that `forward` takes at once, on each data rank.
    """

    forward: Callable[[Sequence[MicroBatch]], Iterable[ModelOutput]]
    parallel: Parallel
    rows_at_once: int
    as_in_training: bool = False
    micro_batches: int = 1

    @classmethod
    def of_model(
        cls, model: HybridModel, rows_at_once: int, *, parallel: Parallel | None = None, predicts: bool = False
    ) -> RowPasses:
        """Those of a model without an engine; parallel: the ranks that hold it. predicts: with the most likely tokens."""
        ranks = parallel or alone(model.head_weight().device)
        return cls(partial(pass_model, model, predicts=predicts), ranks, rows_at_once)

    @torch.no_grad()
    def run(
        self, count: int, read: Callable[[int], Row], *, isolated: bool = True
    ) -> Iterator[tuple[np.ndarray[Any, np.dtype[np.int64]], MicroBatch, ModelOutput]]:
        """Pass `count` rows of one length, of which `read` gives each: numbers of rows, micro-batch and output.

        A data rank reads and yields its own share. Rows that fill up a micro-batch have the number -1 and no labels: all
        data ranks run the same number of passes, because experts and ZeRO-3 weights are spread over them. isolated:
        documents do not see each other. Every rank must call this and take all that comes.
        """
        if not count:
            return
        parallel, cp = self.parallel, self.parallel.groups.cp
        ranks, width = parallel.data_world_size, self.rows_at_once
        if not self.as_in_training:
            width = min(width, -(-count // ranks))
        numbers = np.concatenate([np.arange(count), np.full(-count % (self.micro_batches * ranks * width), -1)])
        for turn in numbers.reshape(-1, self.micro_batches, ranks, width):
            inputs, shares = [], turn[:, parallel.data_rank]
            for own in shares:
                rows = [read(int(number)) if number >= 0 else without_labels(read(0)) for number in own]
                batch = batch_of_rows(rows, isolated)
                inputs.append(MicroBatch.from_batch(batch, cp.rank(), cp.size()).to(parallel.device))
            outputs = [output for output in self.forward(inputs) if output.loss is not None]
            yield from zip(shares, inputs, outputs)


def alone(device: torch.device) -> Parallel:
    """This process without any other; needs no process group."""
    return Parallel(0, 1, 0, 1, device, single_rank_groups(), DataParallelUnit())


def pass_model(model: HybridModel, micro_batches: Sequence[MicroBatch], *, predicts: bool) -> Iterator[ModelOutput]:
    """Forward passes of a model that this process calls itself."""
    for given in micro_batches:
        yield model(given.tokens_BT, given.meta, given.labels_BT, predicts=predicts)


def without_labels(row: Row) -> Row:
    """The same row, none of whose tokens is predicted."""
    return row._replace(labels=np.full(len(row.tokens) - 1, IGNORED_LABEL))
