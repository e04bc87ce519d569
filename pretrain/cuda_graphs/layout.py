"""Where documents begin and end, at addresses that stay: what graphs read of a micro-batch's layout."""

from __future__ import annotations

from dataclasses import replace

import torch

from amfm.model.packing import PackMeta


class FixedLayout:
    """The layout of rows, whatever documents they hold, in tensors that each micro-batch is copied to.

    Rows without boundaries are read as rows with them: one list of launches serves both.
    """

    def __init__(self, meta: PackMeta) -> None:
        self.last: PackMeta | None = None
        self.meta = replace(
            meta,
            document_ids_BT=meta.document_ids_BT.clone(),
            positions_BT=meta.positions_BT.clone(),
            starts_BT=torch.empty_like(meta.document_ids_BT),
            single_document=False,
            document_ends=None,
            padding=None if meta.padding is None else meta.padding.map_tensors(torch.clone),
        )
        self.take(meta)

    def take(self, meta: PackMeta) -> None:
        """Copy the layout of a micro-batch, once for all of its blocks."""
        if meta is self.last:
            return
        assert self.meta.starts_BT is not None and meta.segments is None and not meta.halves
        self.meta.document_ids_BT.copy_(meta.document_ids_BT)
        self.meta.positions_BT.copy_(meta.positions_BT)
        if self.meta.padding is not None and meta.padding is not None:
            self.meta.padding.is_padding_BT.copy_(meta.padding.is_padding_BT)
            self.meta.padding.lengths_B.copy_(meta.padding.lengths_B)
        starts_BT = meta.document_starts_BT()
        self.meta.starts_BT.zero_() if starts_BT is None else self.meta.starts_BT.copy_(starts_BT)
        self.last = meta
