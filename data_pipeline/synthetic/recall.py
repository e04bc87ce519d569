"""Associative recall: keys with values, then keys alone, to be completed by their values.

It asks for what attention does exactly and a recurrence must fit into its state, so accuracy against the number of pairs
measures the capacity of a mixer's state.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from amfm.data_pipeline.synthetic.draws import Draws
from amfm.data_pipeline.synthetic.task import NOISE, SyntheticRow, empty_row


@dataclass(frozen=True)
class AssociativeRecall:
    """Multi-query associative recall, with each key written once or several times.

    A row writes `num_pairs` different keys `num_writes` times each, in random order and with a fresh value each time,
    and then queries each key once for the value written last.

    One write is the task of Arora et al. 2023 (arXiv 2312.04927, section 3); with several, a state must forget what is
    overwritten. A write is two tokens, key and value; a query is the key's token, labelled with the value. Queries stand
    at places drawn uniformly from the rest of the row, which is noise otherwise (the paper draws the distance from a
    power law). Tokens: noise, keys, values. Raises ValueError for more pairs than keys.
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
        """Number of token ids: noise, keys and values."""
        return 1 + self.num_keys + self.num_values

    @property
    def num_classes(self) -> int:
        """Number of different labels: every value."""
        return self.num_values

    @property
    def shortest(self) -> int:
        """Fewest tokens of a row: two a write, one per query."""
        return self.num_pairs * (2 * self.num_writes + 1)

    def make_row(self, draws: Draws, length: int) -> SyntheticRow:
        """Make a row of `length` tokens: the writes, then the queries among noise."""
        tokens_T, labels_T = row = empty_row(length)
        keys = NOISE + 1 + draws.choose(self.num_keys, self.num_pairs)
        written = draws.shuffle(np.tile(np.arange(self.num_pairs), self.num_writes))
        values = NOISE + 1 + self.num_keys + draws.below(self.num_values, len(written))
        begin = 2 * len(written)
        tokens_T[0:begin:2], tokens_T[1:begin:2] = keys[written], values
        # A later write of a key replaces an earlier one.
        last_values = dict(zip(written.tolist(), values.tolist()))
        places = begin + draws.choose(length - begin, self.num_pairs)
        tokens_T[places], labels_T[places] = keys, [last_values[number] for number in range(self.num_pairs)]
        return row
