"""Accuracy on a synthetic task: of all labelled tokens, and of whole rows.

Counted by row, so that parts of a row on several ranks can be summed before a row is judged: one wrong token on any
rank makes the row wrong.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

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
