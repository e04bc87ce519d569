"""A micro-batch with the document layout of training text, for passes whose numbers no one reads."""

from __future__ import annotations

import torch

from amfm.data_pipeline.batch import Batch


def example_batch(rows: int, tokens: int, documents: int, *, is_padded: bool = False) -> Batch:
    """Rows of `documents` documents of nearly equal length; positions and `cu_seqlens` restart at each, tokens are zeros.

    is_padded: rows say where their padding begins, which is behind all of them.
    """
    place_T = torch.arange(tokens)
    ids_T = place_T * documents // tokens
    starts_T = torch.cat([torch.zeros(1, dtype=torch.int64), torch.diff(ids_T)]) > 0
    positions_T = place_T - torch.where(starts_T, place_T, 0).cummax(0).values
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), starts_T.nonzero().flatten()])
    cu_seqlens = torch.cat([(starts + row * tokens) for row in range(rows)] + [torch.tensor([rows * tokens])])
    return Batch(
        tokens_BT=torch.zeros(rows, tokens, dtype=torch.int64),
        labels_BT=torch.zeros(rows, tokens, dtype=torch.int64),
        loss_mask_BT=torch.ones(rows, tokens, dtype=torch.bool),
        positions_BT=positions_T.int().repeat(rows, 1),
        document_ids_BT=ids_T.int().repeat(rows, 1),
        cu_seqlens=cu_seqlens.int(),
        sample_ids=tuple(range(rows)),
        source_ids=(0,) * rows,
        lengths_B=torch.full((rows,), tokens) if is_padded else None,
    )
