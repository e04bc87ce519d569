"""Memory for micro-batches that comes back: to map and clear fresh pages costs more than to fill them with tokens.

numpy keeps the owner of an array's memory alive as its base, and torch.from_numpy keeps the array. So a lent block is known
to be free when the object that all of them hold, `_Loan`, dies; no one has to give anything back, and a batch that
someone keeps is never overwritten.
"""

from __future__ import annotations

import weakref
from functools import partial

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]

MAX_FREE_BYTES = 2**28


class _Loan:
    """Owner that every array over a lent block keeps alive; it dies with the last of them."""

    def __init__(self, block: Bytes) -> None:
        self.block = block
        self.__array_interface__ = block.__array_interface__


class BufferPool:
    """Lends blocks of bytes; a block is free again when no array or tensor looks at its memory any more."""

    def __init__(self) -> None:
        self._free: list[Bytes] = []
        self._lent: dict[int, weakref.ref[_Loan]] = {}

    def lend(self, num_bytes: int) -> Bytes:
        """Lend a block of num_bytes with unspecified contents, a free one of that size if there is any."""
        block = self._free.pop() if self._free else np.empty(num_bytes, np.uint8)
        if len(block) != num_bytes:  # another batch size: its blocks would not fit, so start over
            self._free.clear()
            block = np.empty(num_bytes, np.uint8)
        loan = _Loan(block)
        self._lent[id(block)] = weakref.ref(loan, partial(self._take_back, block))
        return np.asarray(loan)

    def _take_back(self, block: Bytes, _: weakref.ref[_Loan]) -> None:
        """Make a block free again, within MAX_FREE_BYTES; called when its loan dies."""
        del self._lent[id(block)]
        if (len(self._free) + 1) * len(block) <= MAX_FREE_BYTES:
            self._free.append(block)
