"""Interface of a synthetic task: rows of tokens with labels at the places that are judged."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np

from amfm.data_pipeline.samples.packing import IGNORED_LABEL
from amfm.data_pipeline.synthetic.draws import Draws, Int64

NOISE = 0  # the token of places that hold nothing


class SyntheticRow(NamedTuple):
    """One row: tokens_T [T] int64, the input; labels_T [T] int64, the right prediction at each judged place, else -100."""

    tokens_T: Int64
    labels_T: Int64


class SyntheticTask(Protocol):
    """A task with its settings: a frozen dataclass, whose repr is part of the data's identity. Equal tasks give equal rows."""

    @property
    def vocab_size(self) -> int:
        """Number of token ids; tokens and labels are below it."""

    @property
    def num_classes(self) -> int:
        """Number of different labels, all equally frequent: predicting always the same one has accuracy 1 / num_classes."""

    @property
    def shortest(self) -> int:
        """Fewest tokens that a row can have."""

    def make_row(self, draws: Draws, length: int) -> SyntheticRow:
        """Make a row of `length` tokens, a function of the draws alone."""


def empty_row(length: int) -> SyntheticRow:
    """Make a row of noise without labels, to be filled in."""
    return SyntheticRow(np.full(length, NOISE, np.int64), np.full(length, IGNORED_LABEL, np.int64))
