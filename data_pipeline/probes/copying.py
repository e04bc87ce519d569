"""Selective copying: tokens strewn among noise, to be said in order at the end."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data_pipeline.probes.draws import Draws
from data_pipeline.probes.task import NOISE, ProbeRow, empty_row

ASK = NOISE + 1


@dataclass(frozen=True)
class SelectiveCopying:
    """`num_copied` tokens at random places among noise, then as many marks, at each of which the next token is asked.

    What is copied doesn't stand at fixed distances, so a mixer must choose by content what it keeps (Gu and Dao 2023,
    arXiv 2312.00752, section 3.1). Tokens: noise, the mark, `num_symbols` tokens to copy.
    """

    num_copied: int
    num_symbols: int

    @property
    def vocab_size(self) -> int:
        """Noise, mark and symbols."""
        return ASK + 1 + self.num_symbols

    @property
    def num_answers(self) -> int:
        """Any symbol."""
        return self.num_symbols

    @property
    def shortest(self) -> int:
        """The tokens, and a mark for each."""
        return 2 * self.num_copied

    def make_row(self, draws: Draws, length: int) -> ProbeRow:
        """Tokens and noise, then the marks."""
        tokens_T, labels_T = row = empty_row(length)
        end = length - self.num_copied
        symbols = ASK + 1 + draws.below(self.num_symbols, self.num_copied)
        tokens_T[np.sort(draws.choose(end, self.num_copied))] = symbols
        tokens_T[end:], labels_T[end:] = ASK, symbols
        return row
