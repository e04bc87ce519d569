"""Associative recall: keys with values, then keys alone, whose values are asked."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data_pipeline.probes.draws import Draws
from data_pipeline.probes.task import NOISE, ProbeRow, empty_row


@dataclass(frozen=True)
class AssociativeRecall:
    """Rows write each of `num_pairs` different keys `num_writes` times in random order, each time with a value of its
    own, and then ask each key once for the value written last.

    One write is multi-query associative recall (Arora et al. 2023, arXiv 2312.04927, section 3); with several a state
    must forget what it overwrites. A write is the key's token and the value's; a question is the key's token, answered
    at once and not written into the row. Questions stand at places drawn uniformly from the rest of the row, which
    else is noise (the paper draws the distance from a power law). Tokens: noise, keys, values.
    """

    num_pairs: int
    num_writes: int
    num_keys: int
    num_values: int

    def __post_init__(self) -> None:
        if self.num_pairs > self.num_keys:
            raise ValueError(
                f"num_pairs={self.num_pairs} must be at most num_keys={self.num_keys}: the keys of a row differ; "
                "lower it, or raise num_keys"
            )

    @property
    def vocab_size(self) -> int:
        """Noise, keys and values."""
        return 1 + self.num_keys + self.num_values

    @property
    def num_answers(self) -> int:
        """Any value."""
        return self.num_values

    @property
    def shortest(self) -> int:
        """Two tokens a write, one a question."""
        return self.num_pairs * (2 * self.num_writes + 1)

    def make_row(self, draws: Draws, length: int) -> ProbeRow:
        """Writes first, then questions between noise."""
        tokens_T, labels_T = row = empty_row(length)
        keys = NOISE + 1 + draws.choose(self.num_keys, self.num_pairs)
        written = draws.shuffle(np.tile(np.arange(self.num_pairs), self.num_writes))
        values = NOISE + 1 + self.num_keys + draws.below(self.num_values, len(written))
        begin = 2 * len(written)
        tokens_T[0:begin:2], tokens_T[1:begin:2] = keys[written], values
        last_values = dict(zip(written.tolist(), values.tolist()))
        places = begin + draws.choose(length - begin, self.num_pairs)
        tokens_T[places], labels_T[places] = keys, [last_values[number] for number in range(self.num_pairs)]
        return row
