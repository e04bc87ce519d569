"""Micro-batches for a simulated rank: real document boundaries, meaningless tokens.

Document layout decides shapes and how many sequences kernels see, so it is real; token ids are zeros, because nothing
on the host reads them.
"""

from __future__ import annotations

import torch

from amfm.data_pipeline.batch import Batch
from amfm.pretrain.config.schema import RunConfig

DOCUMENTS = 3  # a row


def simulated_batches(config: RunConfig, data_ranks: int) -> list[Batch]:
    """A data rank's micro-batches of one step, the same batch each time.

    Every row holds `DOCUMENTS` documents of nearly equal length; positions and `cu_seqlens` restart at each.
    """
    train = config.train
    count = train.global_batch_size // train.micro_batch_size // data_ranks
    rows, tokens = train.micro_batch_size, train.sequence_length
    place_T = torch.arange(tokens)
    ids_T = place_T * DOCUMENTS // tokens
    starts_T = torch.cat([torch.zeros(1, dtype=torch.int64), torch.diff(ids_T)]) > 0
    positions_T = place_T - torch.where(starts_T, place_T, 0).cummax(0).values
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), starts_T.nonzero().flatten()])
    cu_seqlens = torch.cat([(starts + row * tokens) for row in range(rows)] + [torch.tensor([rows * tokens])])
    batch = Batch(
        tokens_BT=torch.zeros(rows, tokens, dtype=torch.int64),
        labels_BT=torch.zeros(rows, tokens, dtype=torch.int64),
        loss_mask_BT=torch.ones(rows, tokens, dtype=torch.bool),
        positions_BT=positions_T.int().repeat(rows, 1),
        document_ids_BT=ids_T.int().repeat(rows, 1),
        cu_seqlens=cu_seqlens.int(),
        sample_ids=tuple(range(rows)),
        source_ids=(0,) * rows,
    )
    return [batch] * count
