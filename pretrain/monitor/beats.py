"""Beats: where ranks are, as nodes publish them, and who holds up the others by them.

Where the ranks of a node are is in memory that they share, so that one of them writes a file for all. A file per rank, written
every two seconds, is thousands of writes a second to shared storage at a thousand ranks, and as many opens for whoever looks.
So ranks of a node note their places in a small file that is in the node's memory, and one of them, the writer, puts all of them
into the run directory. No one is appointed: who published last continues, and where nothing was published for a while (the
writer died, or is stopped) whoever finds out continues in its place. Ranks that share no memory, each in its own container, are
writers each for itself.

Whether the ranks next to this one still give signs of life: a node that is gone, or a rank that is stopped, is found
in a minute.

A rank may stay in a phase for many minutes with good reason, so `launch.heartbeat_seconds` is long. But a process that lives
beats every two seconds, whatever its phase. So where this node has not moved for a while, one rank of it looks at the beats of
the others of the node and of the next node, in a ring of all nodes: a directory once, then one small file, so that what a stall
asks of the storage does not grow with ranks times ranks. Beats are compared with themselves and never with this node's clock,
which may be another. What storage does not give says nothing.
"""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
import stat
import struct
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import astuple, dataclass
from pathlib import Path

from amfm.data_pipeline.durable.json_files import parse_line

# In the order in which a step passes them: who is in an earlier one than the others is waited for.
PHASES = ("start", "compile", "data", "count", "forward", "reduce", "optimizer", "validate", "tasks", "save")
MAX_BEATS_BYTES = 2**20  # of a node
MAX_NAMED_HOSTS = 8  # in one message
MEMORY = Path("/dev/shm")
# Who publishes, and when it last did by the clock that all processes of a node share. Ranks count from 1; 0: no one.
HEADER = struct.Struct("<qd")
# Of one rank: step, number of its phase, time of its last sign of life.
SLOT = struct.Struct("<qqqd")
MISSED = 1.25  # intervals without a publication after which another rank takes over


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


class NodeBoard:
    """Slots for the ranks of a node, of which a rank writes only its own.

    Without a token this process has it for itself.

    A slot that is read while it is written may show an old step next to a new phase, until the next look. Raises
    OSError for a file that another user put there, and for a link: anyone may write to the node's memory.
    """

    def __init__(self, rank: int, num_ranks: int = 1, path: Path | None = None) -> None:
        self.rank, self.path = rank, path
        self.num_slots = num_ranks if path is not None else 1
        self.place = HEADER.size + SLOT.size * (rank if path is not None else 0)
        size = HEADER.size + SLOT.size * self.num_slots
        self.memory: mmap.mmap | bytearray = bytearray(size)
        if path is not None:
            number = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                facts = os.fstat(number)
                if facts.st_uid != os.geteuid() or not stat.S_ISREG(facts.st_mode) or facts.st_nlink != 1:
                    raise PermissionError(errno.EPERM, "not a file of this user's", str(path))
                # Every rank the same: what is there stays. Full memory is an error here, and a SIGBUS in a file with holes.
                os.posix_fallocate(number, 0, size)
                self.memory = mmap.mmap(number, size)
            finally:
                os.close(number)

    @classmethod
    def of_start(cls, run_dir: Path, token: str, rank: int, num_ranks: int) -> NodeBoard:
        """The board of a start of a run, which `token` names, on this node.

        A private one where memory has no room for it.

        Boards of earlier starts that no one could clear away are removed.
        """
        folder = MEMORY if MEMORY.is_dir() else Path(tempfile.gettempdir())
        prefix = f"amfm-{hashlib.sha256(str(run_dir.resolve()).encode()).hexdigest()[:16]}"
        path = folder / f"{prefix}-{token}"
        try:
            for old in folder.glob(f"{prefix}-*"):
                if old != path:
                    old.unlink(missing_ok=True)
            return cls(rank, num_ranks, path)
        except OSError:
            return cls(rank)

    def note(self, step: int, phase: int, seen: float) -> None:
        """Write down where this rank is."""
        SLOT.pack_into(self.memory, self.place, self.rank + 1, step, phase, seen)

    def clear(self) -> None:
        """Take this rank off the board."""
        SLOT.pack_into(self.memory, self.place, 0, 0, 0, 0.0)

    def read(self) -> list[tuple[int, int, int, float]]:
        """Rank, step, number of the phase and time of every rank that is on the board, in rank order."""
        slots = SLOT.iter_unpack(memoryview(self.memory)[HEADER.size : HEADER.size + SLOT.size * self.num_slots])
        return [(rank - 1, step, phase, seen) for rank, step, phase, seen in slots if rank]

    def claim(self, interval: float) -> bool:
        """Whether this rank is to publish now: it did last, or who did has not for over an interval."""
        writer, published = HEADER.unpack_from(self.memory)
        now = time.monotonic()
        if writer != self.rank + 1 and writer and 0 <= now - published <= MISSED * interval:
            return False
        HEADER.pack_into(self.memory, 0, self.rank + 1, now)
        return True

    def remove(self) -> None:
        """Remove the board from the node's memory, for the last one that leaves it."""
        if self.path is not None:
            with suppress(OSError):
                self.path.unlink(missing_ok=True)
