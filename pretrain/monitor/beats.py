"""Beats: where ranks are, as nodes publish them, and who holds up the others by them.

Whether the ranks next to this one still give signs of life: a node that is gone, or a rank that is stopped, is found
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
from contextlib import suppress
from dataclasses import astuple, dataclass
from pathlib import Path

from amfm.data_pipeline.durable.lines import parse_line

# In the order in which a step passes them: who is in an earlier one than the others is waited for.
PHASES = ("start", "compile", "data", "count", "forward", "reduce", "optimizer", "validate", "tasks", "save")
MAX_BEATS_BYTES = 2**20  # of a node
MAX_NAMED_HOSTS = 8  # in one message


@dataclass(frozen=True)
class Beat:
    """Where one rank is: in which phase of which step, and when it was last seen (seconds since the epoch)."""

    rank: int
    host: str
    step: int
    phase: str
    seen: float

    def place(self) -> tuple[int, int]:
        """Sort key of ranks by how far they are: step, then phase."""
        return self.step, PHASES.index(self.phase)


def read_beats(directory: Path) -> list[Beat]:
    """Read the last beat of every rank that has not ended in good order, in rank order; what cannot be read is left out."""
    found: dict[int, Beat] = {}
    for path in directory.glob("rank-*.json"):
        for beat in read_node(path):
            # A file of a node whose first rank was not yet there may have stayed: the newer beat of a rank counts.
            if beat.rank not in found or found[beat.rank].seen < beat.seen:
                found[beat.rank] = beat
    return [found[rank] for rank in sorted(found)]


def read_node(path: Path) -> list[Beat]:
    """Read the last beats of the ranks of a node; what no rank wrote is left out, and all of it where they ended just now."""
    try:
        with path.open("rb") as file:
            lines = file.read(MAX_BEATS_BYTES).splitlines()
    except OSError:
        return []
    return [beat for line in lines if (beat := parse_beat(line)) is not None]


def parse_beat(line: bytes) -> Beat | None:
    """The beat of a line; None where it is not what a rank wrote."""
    try:
        beat = Beat(**(parse_line(line) or {}))
    except TypeError:
        return None
    kinds: tuple[type | tuple[type, ...], ...] = (int, str, int, str, (int, float))
    is_whole = beat.phase in PHASES and all(isinstance(value, kind) for value, kind in zip(astuple(beat), kinds))
    return beat if is_whole else None


def clear_beats(run_dir: Path) -> None:
    """Remove the beats that an earlier start left; call it when that start is silent, and before any rank of this one beats."""
    for path in (run_dir / "heartbeats").glob("rank-*.json"):
        with suppress(OSError):
            path.unlink(missing_ok=True)


def describe_lost(beats: list[Beat]) -> str:
    """Describe lost ranks, with host, step and phase; empty for none."""
    return ", ".join(
        f"rank {beat.rank} on {beat.host} is lost (last seen at step {beat.step}, {beat.phase})" for beat in beats
    )


def describe_unseen(gone: Sequence[tuple[Beat, float]]) -> str:
    """Describe ranks without a sign of life, each with the seconds since its last one."""
    return "not seen any more: " + ", ".join(
        f"rank {beat.rank} on {beat.host} (for {silent:.0f} s, last at step {beat.step}, {beat.phase})"
        for beat, silent in gone
    )


def name_laggards(beats: list[Beat], own_rank: int, unseen_seconds: float) -> str:
    """Name the ranks that the others wait for: those not seen for so long (stopped or gone), else those that are behind."""
    now = time.time()
    gone = [(beat, now - beat.seen) for beat in beats if now - beat.seen > unseen_seconds and beat.rank != own_rank]
    if gone:
        return describe_unseen(gone)
    furthest = max((beat.place() for beat in beats), default=(0, 0))
    behind = [beat for beat in beats if beat.place() < furthest]
    if behind:
        return "behind the others: " + ", ".join(
            f"rank {beat.rank} on {beat.host} (at step {beat.step}, {beat.phase})" for beat in behind
        )
    if furthest[1] == PHASES.index("data"):
        return "all ranks wait for data, so the storage of data.store is the suspect"
    hosts = sorted({beat.host for beat in beats})
    ends = "them" if not 2 <= len(hosts) <= MAX_NAMED_HOSTS else " and ".join((", ".join(hosts[:-1]), hosts[-1]))
    return f"all ranks are at the same place, so the network between {ends} is the suspect"


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

    def poll(self, own_rank: int, of_node: Sequence[Beat]) -> list[tuple[Beat, float]]:
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
