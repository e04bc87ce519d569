"""What training receives: rows of tokens whose labels, mask, positions and document ids agree by construction.

All arrays of a batch are made together from the same document starts (samples/packing.py), because they say the same thing
in the forms that different blocks read: ids for masks, positions for rotary angles, cu_seqlens for kernels of variable
length. A block that computed its own could disagree about where a document ends, and nothing would fail.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Batch:
    """A micro-batch of B sequences of T tokens.

    tokens_BT int64. labels_BT int64: the next token, -100 where masked. loss_mask_BT bool: where a label counts.
    positions_BT int32: restart at 0 in each document and row. document_ids_BT int32: 0, 1, 2... in each row, never
    falling; padding after the last document has its own id. cu_seqlens int32: starts of the documents in the
    flattened B*T tokens, and B*T as last entry. sample_ids: global sample number of each row. source_ids: index of
    each row's source in the sorted list of names (`PretrainLoader.source_names`). lengths_B int64: tokens of each row before
    its padding; None if no row is padded.
    """

    tokens_BT: torch.Tensor
    labels_BT: torch.Tensor
    loss_mask_BT: torch.Tensor
    positions_BT: torch.Tensor
    document_ids_BT: torch.Tensor
    cu_seqlens: torch.Tensor
    sample_ids: tuple[int, ...]
    source_ids: tuple[int, ...]
    lengths_B: torch.Tensor | None = None

    @property
    def num_documents(self) -> int:
        """Number of documents in all rows; a row's padding counts as one."""
        return len(self.cu_seqlens) - 1
