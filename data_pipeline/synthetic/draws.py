"""Random numbers of one row, a function of only its key: equal on every machine and under every release of numpy.

A generator a row, so that any row can be made without those before it.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from amfm.data_pipeline.samples.packing import IGNORED_LABEL

Int64 = npt.NDArray[np.int64]


class Draws:
    """Stream of random numbers from a key of at least 16 bytes, of which the first 16 are used.

    Built on the raw words of Philox (Salmon et al. 2011): numpy guarantees the words of a bit generator for ever, but
    may change what its distributions derive from them (NEP 19).
    """

    def __init__(self, key: bytes) -> None:
        self._bits = np.random.Philox(key=int.from_bytes(key[:16], "little"))

    def below(self, bound: int, count: int) -> Int64:
        """Draw `count` independent integers in [0, bound); the bias of a value is at most bound / 2^63."""
        return (self._words(count) >> np.uint64(1)).astype(np.int64) % bound

    def choose(self, bound: int, count: int) -> Int64:
        """Draw `count` different integers in [0, bound), in random order."""
        assert count <= bound, f"{count} different numbers of {bound}"
        return np.argsort(self._words(bound), kind="stable")[:count]

    def shuffle(self, values: Int64) -> Int64:
        """Return the values in random order."""
        return values[self.choose(len(values), len(values))]

    def _words(self, count: int) -> npt.NDArray[np.uint64]:
        words: npt.NDArray[np.uint64] = self._bits.random_raw(count)
        return words


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
        """Make a row of `length` tokens, a function of only the draws."""


def empty_row(length: int) -> SyntheticRow:
    """Make a row of noise without labels, to be filled in."""
    return SyntheticRow(np.full(length, NOISE, np.int64), np.full(length, IGNORED_LABEL, np.int64))
