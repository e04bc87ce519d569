"""Where documents begin and end in a packed batch: built once a micro-batch and read by every block."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from model.segments import Segments


@dataclass(frozen=True)
class PackMeta:
    """Document layout of one micro-batch.

    document_ids_BT [B, T] int32, nondecreasing inside a row. positions_BT [B, T] int64, the place inside the document.
    cu_seqlens [documents + 1] int32, starts in the flattened B * T tokens, the total last. single_document: no row has
    a boundary, so blocks may take the path without masks. first_continues: each row's first token goes on with the
    document that a decode state holds. segments: where ids and positions are those of this rank's part of the rows, T
    its tokens; the other fields stay those of whole rows.
    """

    document_ids_BT: Tensor
    positions_BT: Tensor
    cu_seqlens: Tensor
    max_document_length: int
    single_document: bool
    first_continues: bool = False
    segments: Segments | None = None

    @classmethod
    def from_document_ids(cls, document_ids_BT: Tensor, positions_BT: Tensor | None = None) -> PackMeta:
        """Layout of packed rows; positions restart at each document when they are not given.

        Raises ValueError where ids decrease inside a row.
        """
        if document_ids_BT.dim() != 2 or document_ids_BT.numel() == 0:
            raise ValueError(f"document_ids must be [rows, tokens] and not empty, not {tuple(document_ids_BT.shape)}")
        num_rows, num_tokens = document_ids_BT.shape
        device = document_ids_BT.device
        step_BT = torch.diff(document_ids_BT, dim=1)
        if bool((step_BT < 0).any()):
            raise ValueError("document_ids must not decrease inside a row; number documents in the order they stand")
        starts_BT = torch.ones(num_rows, num_tokens, dtype=torch.bool, device=device)
        starts_BT[:, 1:] = step_BT > 0
        starts = starts_BT.flatten().nonzero().flatten()
        cu_seqlens = torch.cat([starts, starts.new_tensor([num_rows * num_tokens])])
        if positions_BT is None:
            column_T = torch.arange(num_tokens, device=device)
            positions_BT = column_T - torch.where(starts_BT, column_T, 0).cummax(dim=1).values
        return cls(
            document_ids_BT=document_ids_BT.to(torch.int32),
            positions_BT=positions_BT.to(torch.int64),
            cu_seqlens=cu_seqlens.to(torch.int32),
            max_document_length=int(cu_seqlens.diff().max()),
            single_document=len(starts) == num_rows,
        )

    @classmethod
    def one_document_a_row(
        cls, num_rows: int, num_tokens: int, *, start: int = 0, device: torch.device | str | None = None
    ) -> PackMeta:
        """Layout of rows without boundaries whose first token stands at position `start`; start > 0 continues a state."""
        ids_BT = torch.zeros(num_rows, num_tokens, dtype=torch.int32, device=device)
        positions_T = torch.arange(start, start + num_tokens, device=device)
        cu_seqlens = torch.arange(0, (num_rows + 1) * num_tokens, num_tokens, dtype=torch.int32, device=device)
        return cls(ids_BT, positions_T.expand(num_rows, -1), cu_seqlens, num_tokens, True, first_continues=start > 0)

    def cut(self, rank: int, num_ranks: int) -> PackMeta:
        """The layout of the part that one of `num_ranks` context ranks has of these rows; of one rank, this one.

        Cut tokens and labels alike, with `segments.take`. Raises ValueError where rows cannot be cut evenly.
        """
        if num_ranks == 1:
            return self
        segments = Segments.of_rows(self.document_ids_BT, rank, num_ranks)
        return replace(
            self,
            document_ids_BT=segments.take(self.document_ids_BT),
            positions_BT=segments.take(self.positions_BT),
            segments=segments,
        )

    def boundaries_BT(self) -> Tensor | None:
        """The ids that kernels need to reset at documents; None where there is nothing to reset."""
        return None if self.single_document else self.document_ids_BT
