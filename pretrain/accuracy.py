"""How many answers of a probe are right, of all that were asked and row by row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

IGNORED = -100


@dataclass(frozen=True)
class Accuracy:
    """Shares of right answers: of all that were asked, and of rows in which every answer is right."""

    answers: float
    rows: float
    num_answers: int
    num_rows: int


def count_answers(predictions_BT: Tensor, labels_BT: Tensor) -> Tensor:
    """Answers asked and right in each row, or in the part of it that is here, [B, 2] float64."""
    is_asked_BT = labels_BT != IGNORED
    is_right_BT = is_asked_BT & (predictions_BT == labels_BT)
    return torch.stack([is_asked_BT.sum(1), is_right_BT.sum(1)], dim=1).double()


def measure_accuracy(counts_B2: Tensor) -> Accuracy:
    """The accuracy over rows of `count_answers`; each asks something."""
    asked, right = counts_B2.sum(0).tolist()
    whole = (counts_B2[:, 0] == counts_B2[:, 1]).double().mean()
    return Accuracy(right / max(1.0, asked), float(whole), int(asked), len(counts_B2))
