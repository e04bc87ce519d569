"""Document boundaries as kernels take them: where a token's document begins."""

from __future__ import annotations

import torch
from torch import Tensor


def first_tokens(document_ids_BT: Tensor) -> Tensor:
    """Place of the first token of each token's document, [B, T] int32: a document is a run of equal ids.

    No host synchronisation. An id that returns after another one begins a new document.
    """
    place_T = torch.arange(document_ids_BT.shape[1], device=document_ids_BT.device)
    begins_BT = torch.ones_like(document_ids_BT, dtype=torch.bool)
    begins_BT[:, 1:] = document_ids_BT[:, 1:] != document_ids_BT[:, :-1]
    return place_T.where(begins_BT, 0).cummax(1).values.to(torch.int32)
