"""A thread of a reading process that brings blocks of a remote store to the node long before their rows are due.

When a shuffle window begins, nearly every row lies in a block that no one has read yet: without this the trainer would
wait for a request per row, and then for none. The order of samples is known, so what will be due is read and not
guessed. A thread is enough, because it waits for the network.
"""

from __future__ import annotations

import threading

import numpy as np

from amfm.data_pipeline.samples.samples import SampleReader

AHEAD_ROWS = 2048  # of this process: minutes of training, and more blocks than a window has


class FetchAhead(threading.Thread):
    """Reads the rows that come after those that were asked for, and throws them away: their blocks stay in the node cache.

    It has its own files; the folder of the node cache is made for several readers. Errors are left to the reader
    that needs the row.
    """

    def __init__(self, reader: SampleReader) -> None:
        super().__init__(daemon=True, name="fetch-ahead")
        self._reader = reader.with_own_files()
        self._due = (0, 1, 1)
        self._moved = threading.Event()

    def move_to(self, first: int, count: int, stride: int) -> None:
        """Report which rows are being read: [first, first + count), the next ones `stride` later."""
        self._due = first, count, stride
        self._moved.set()

    def run(self) -> None:
        """Stay ahead until the process ends."""
        reached, last = 0, 0
        while True:
            self._moved.wait()
            self._moved.clear()
            first, count, stride = self._due
            reached = max(first, reached) if first >= last else first  # back after a seek: begin again
            last = first
            while reached < first + stride * max(1, AHEAD_ROWS // count):
                reached += stride
                self._fetch(reached, count)
                if self._due[0] > first:
                    first = last = self._due[0]

    def _fetch(self, first: int, count: int) -> None:
        """Read rows for their blocks' sake; a failure is met again, and reported, by the reader that needs the row."""
        try:
            self._reader.read(np.arange(first, first + count, dtype=np.int64))
        except RuntimeError:
            return
