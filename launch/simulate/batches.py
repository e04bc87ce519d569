"""Micro-batches for a simulated rank: real document boundaries, meaningless tokens.

Document layout decides shapes and how many sequences kernels see, so it is real; token ids are zeros, because nothing
on the host reads them.
"""

from __future__ import annotations

from amfm.data_pipeline.batch import Batch
from amfm.pretrain.config.schema import RunConfig
from amfm.pretrain.opening.data import example_batch

DOCUMENTS = 3  # a row
MORE_DOCUMENTS = 5  # a row of the step before those that are measured


def simulated_batches(config: RunConfig, data_ranks: int, documents: int = DOCUMENTS) -> list[Batch]:
    """A data rank's micro-batches of one step, the same batch each time."""
    train = config.train
    count = train.global_batch_size // train.micro_batch_size // data_ranks
    is_padded = config.data.packing == "best_fit"
    return [example_batch(train.micro_batch_size, train.sequence_length, documents, is_padded=is_padded)] * count
