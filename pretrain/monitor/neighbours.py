"""Whether the ranks next to this one still give signs of life: a node that is gone, or a rank that is stopped, is found
in a minute.

A rank may stay in a phase for many minutes with good reason, so `launch.heartbeat_seconds` is long. But a process that lives
beats every two seconds, whatever its phase. So where this node has not moved for a while, one rank of it looks at the beats of
the others of the node and of the next node, in a ring of all nodes: a directory once, then one small file, so that what a stall
asks of the storage does not grow with ranks times ranks. Beats are compared with themselves and never with this node's clock,
which may be another. What storage does not give says nothing.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from amfm.pretrain.monitor.beats import Beat, read_node

LOOK_SECONDS = 4.0
SILENT_SECONDS = 45.0  # without a beat, which comes every two: the process is gone or stopped, whatever its phase was


class Neighbours:
    """The last beats of the ranks that this one watches, and since when they have not changed.

    `directory`: where nodes publish.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.next_file: Path | None = None
        self.known: dict[int, tuple[Beat, float]] = {}
        self.looked = time.monotonic()

    def forget(self) -> None:
        """Begin again: this rank has moved, or was itself stopped."""
        self.known, self.next_file = {}, None
        self.looked = time.monotonic()

    def look(self, own_rank: int, of_node: Sequence[Beat]) -> list[tuple[Beat, float]]:
        """Look at the others of this node and at the next one; returns each beat with the seconds since it has changed."""
        now = time.monotonic()
        if now - self.looked > 3 * LOOK_SECONDS:
            self.forget()
        self.looked = now
        mates = {beat.rank for beat in of_node}
        others = [beat for beat in of_node if beat.rank != own_rank]
        beats = {beat.rank: beat for beat in [*others, *self._next_node(mates)]}
        # Who is not there any more has ended in good order.
        self.known = {
            rank: self.known[rank] if rank in self.known and self.known[rank][0].seen == beat.seen else (beat, now)
            for rank, beat in beats.items()
        }
        return [(beat, now - since) for beat, since in self.known.values()]

    def _next_node(self, mates: set[int]) -> list[Beat]:
        """The beats of the node after this one, by the lowest ranks; none if there is no other."""
        if self.next_file is None or not self.next_file.exists():
            files = {int(path.stem.removeprefix("rank-")): path for path in self.directory.glob("rank-*.json")}
            ranks = sorted(files.keys() - mates)
            following = [rank for rank in ranks if rank > min(mates)] or ranks
            self.next_file = files[following[0]] if following else None
        return [] if self.next_file is None else [beat for beat in read_node(self.next_file) if beat.rank not in mates]
