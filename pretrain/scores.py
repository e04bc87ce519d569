"""What validation measures next to the loss: losses by source, in bits per byte too, and the accuracy on a synthetic task.

A loss in nats per token depends on the tokenizer: longer tokens are harder to guess and there are fewer of them.
Divided by the text that a token stands for it does not, so models with different tokenizers compare. The text of a
token is the average of its source and split, as the store's manifest has it; sources that came as tokens (.idx) have
none.

Accuracy is of all labeled tokens and of whole rows. It is counted by row, so that parts of a row on several ranks can be summed
before a row counts as right: one wrong token on any rank makes the row wrong.
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
class Accuracy:
    """Shares predicted right: of the labelled tokens, and of the rows in which every labelled token is right."""

    token_accuracy: float
    row_accuracy: float
    num_labels: int
    num_rows: int

    def to_event(self) -> dict[str, float | int]:
        """Build the `accuracy` field of a validation event, whose keys are older than the names here."""
        return {
            "answers": self.token_accuracy,
            "rows": self.row_accuracy,
            "num_answers": self.num_labels,
            "num_rows": self.num_rows,
        }


def count_correct(predictions_BT: Tensor, labels_BT: Tensor) -> Tensor:
    """Count labelled and rightly predicted tokens of each row, or of the part of it on this rank: [B, 2] float64."""
    is_labelled_BT = labels_BT != IGNORED
    is_right_BT = is_labelled_BT & (predictions_BT == labels_BT)
    return torch.stack([is_labelled_BT.sum(1), is_right_BT.sum(1)], dim=1).double()


def measure_accuracy(counts_B2: Tensor) -> Accuracy:
    """Compute the accuracy from the counts of `count_correct`; each row has a label."""
    labelled, right = counts_B2.sum(0).tolist()
    whole = (counts_B2[:, 0] == counts_B2[:, 1]).double().mean()
    return Accuracy(right / max(1.0, labelled), float(whole), int(labelled), len(counts_B2))


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
