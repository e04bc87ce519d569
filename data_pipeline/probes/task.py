"""What a probe is: rows of tokens with a label where an answer is asked."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np

from data_pipeline.probes.draws import Draws, Int64
from data_pipeline.samples.packing import IGNORED_LABEL

NOISE = 0  # the token of places that hold nothing


class ProbeRow(NamedTuple):
    """tokens_T: what the model reads. labels_T: the answer at each place that asks, -100 elsewhere."""

    tokens_T: Int64
    labels_T: Int64


class ProbeTask(Protocol):
    """A frozen dataclass of the settings of one task; two that are equal give equal rows."""

    @property
    def vocab_size(self) -> int:
        """Token ids, labels included, are below it."""

    @property
    def num_answers(self) -> int:
        """Different answers, each as frequent as the others: guessing one is right in 1 of so many."""

    @property
    def shortest(self) -> int:
        """Fewest tokens of a row."""

    def make_row(self, draws: Draws, length: int) -> ProbeRow:
        """A row of `length` tokens, a function of the draws alone."""


def empty_row(length: int) -> ProbeRow:
    """A row of noise that asks nothing, to be filled."""
    return ProbeRow(np.full(length, NOISE, np.int64), np.full(length, IGNORED_LABEL, np.int64))
