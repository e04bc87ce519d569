"""Losses by source of text, and in bits per byte next to nats per token.

A loss in nats per token depends on the tokenizer: longer tokens are harder to guess and there are fewer of them.
Divided by the text that a token stands for it does not, so models with different tokenizers compare. The text of a
token is the average of its source and split, as the store's manifest has it; sources that came as tokens (.idx) have
none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from amfm.data_pipeline.store.manifest import Split
from amfm.data_pipeline.store.store import TokenStore

IGNORED = -100  # label of a token that is not predicted


@dataclass(frozen=True)
class SourceLoss:
    """Mean negative log-likelihood a token in nats, the tokens predicted, and bits per byte where the bytes are
    known.
    """

    loss: float
    tokens: int
    bits_per_byte: float | None


def sum_by_source(token_nll_R: Tensor, labels_BT: Tensor, source_ids: Sequence[int], num_sources: int) -> Tensor:
    """Sum the losses of a micro-batch, or of this rank's part of its rows, by source.

    [S, 2] float64, nats and tokens.
    """
    nll_B = token_nll_R.view(labels_BT.shape).double().sum(1)
    tokens_B = (labels_BT != IGNORED).double().sum(1)
    sums_S2 = torch.zeros(num_sources, 2, dtype=torch.float64, device=nll_B.device)
    place_B = torch.tensor(source_ids, device=nll_B.device)
    return sums_S2.index_add_(0, place_B, torch.stack([nll_B, tokens_B], dim=1))


def losses_of(sums: Mapping[str, tuple[float, int]], store: TokenStore, split: Split) -> dict[str, SourceLoss]:
    """Losses by source, from the nats and tokens of each; sources without a token are left out."""
    return {
        name: SourceLoss(nll / tokens, tokens, bits_per_byte({name: (nll, tokens)}, store, split))
        for name, (nll, tokens) in sums.items()
        if tokens
    }


def bits_per_byte(sums: Mapping[str, tuple[float, int]], store: TokenStore, split: Split) -> float | None:
    """Bits per byte over all sources, from the nats and tokens of each; None if the bytes of one are not known."""
    num_bytes = 0.0
    for name, (_, tokens) in sums.items():
        per_token = store.bytes_per_token(name, split)
        if tokens and per_token is None:
            return None
        num_bytes += tokens * (per_token or 0.0)
    return sum(nll for nll, _ in sums.values()) / math.log(2) / num_bytes if num_bytes else None
