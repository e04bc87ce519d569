"""Selective copying: tokens scattered among noise, to be repeated in order at the end of the row."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from amfm.data_pipeline.synthetic.draws import Draws
from amfm.data_pipeline.synthetic.task import NOISE, SyntheticRow, empty_row

COPY = NOISE + 1  # the token that stands where a copied token is to be predicted


@dataclass(frozen=True)
class SelectiveCopying:
    """`num_copied` tokens at random places among noise, then as many copy marks, each labelled with the next of them.

    The distances vary from row to row, so a mixer must select by content what it keeps; a time-invariant one can't (Gu
    and Dao 2023, arXiv 2312.00752, section 3.1). Tokens: noise, the copy mark, `num_symbols` tokens to copy.
    """

    num_copied: int
    num_symbols: int

    @property
    def vocab_size(self) -> int:
        """Number of token ids: noise, copy mark and symbols."""
        return COPY + 1 + self.num_symbols

    @property
    def num_classes(self) -> int:
        """Number of different labels: every symbol."""
        return self.num_symbols

    @property
    def shortest(self) -> int:
        """Fewest tokens of a row: the symbols to copy and a mark for each."""
        return 2 * self.num_copied

    def make_row(self, draws: Draws, length: int) -> SyntheticRow:
        """Make a row of `length` tokens: symbols among noise, then the copy marks."""
        tokens_T, labels_T = row = empty_row(length)
        end = length - self.num_copied
        symbols = COPY + 1 + draws.below(self.num_symbols, self.num_copied)
        # Sorted places, so that the order of the symbols in the row is the order to repeat them in.
        tokens_T[np.sort(draws.choose(end, self.num_copied))] = symbols
        tokens_T[end:], labels_T[end:] = COPY, symbols
        return row
