"""What an indexer gives of a row, and which keys of it a block of queries sees."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Of the Triton kernels' tiles: heads in forward, which fetches chosen keys once for each tile, and in backward, where the
# gradients of scores are read once for each tile of channels.
FORWARD_HEADS, SLOPE_HEADS, SUM_CHANNELS = 32, 128, 128


class IndexRows(NamedTuple):
    """Score of query t and key s: sum over heads i of weight_ti relu(q_ti . k_s).

    q [B, T, I, C], one key head k [B, S, C] of which the last T are those of the queries, weight [B, T, I].
    """

    q_BTIC: Tensor
    k_BSC: Tensor
    weight_BTI: Tensor

    def after(self, known_BSC: Tensor | None) -> IndexRows:
        """The same queries, whose keys continue those of a cache."""
        assert known_BSC is not None, "a cache of keys that are chosen has the indexer's"
        return self._replace(k_BSC=torch.cat([known_BSC, self.k_BSC], dim=1))


def keep(part: Tensor) -> Tensor:
    """Nothing to add from elsewhere."""
    return part


def visible(ids_BS: Tensor | None, start: int, stop: int, before: int, device: torch.device) -> Tensor:
    """Whether queries start to stop see the keys before the last of them: [B or 1, queries, before + stop] bool.

    Query t stands at key before + t.
    """
    place_S = torch.arange(before + stop, device=device)
    seen_1TS = (place_S <= place_S[before + start :, None])[None]
    if ids_BS is None:
        return seen_1TS
    return seen_1TS & (ids_BS[:, before + start : before + stop, None] == ids_BS[:, None, : before + stop])
