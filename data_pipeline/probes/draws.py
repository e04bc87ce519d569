"""Random numbers of one row: functions of a key alone, on every machine and with every release of numpy."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Int64 = npt.NDArray[np.int64]


class Draws:
    """A stream of numbers from a key of 16 bytes or more, of which the first 16 count.

    Only the raw words of Philox (Salmon et al. 2011) are used: numpy keeps those of a bit generator for good, not what
    its distributions make of them (NEP 19).
    """

    def __init__(self, key: bytes) -> None:
        self._bits = np.random.Philox(key=int.from_bytes(key[:16], "little"))

    def below(self, bound: int, count: int) -> Int64:
        """`count` independent numbers in [0, bound), uniform to 1 part in 2^63 / bound."""
        return (self._words(count) >> np.uint64(1)).astype(np.int64) % bound

    def choose(self, bound: int, count: int) -> Int64:
        """`count` different numbers in [0, bound), in random order."""
        assert count <= bound, f"{count} different numbers of {bound}"
        return np.argsort(self._words(bound), kind="stable")[:count]

    def shuffle(self, values: Int64) -> Int64:
        """The values in random order."""
        return values[self.choose(len(values), len(values))]

    def _words(self, count: int) -> npt.NDArray[np.uint64]:
        words: npt.NDArray[np.uint64] = self._bits.random_raw(count)
        return words
