"""Where the ranks of a node are, in memory that they share, so that one of them writes a file for all.

A file per rank, written every two seconds, is thousands of writes a second to shared storage at a thousand ranks, and
as many opens for whoever looks. So ranks of a node note their places in a small file that is in the node's memory,
and one of them, the writer, puts all of them into the run directory. No one is appointed: who published last continues,
and where nothing was published for a while (the writer died, or is stopped) whoever finds out continues in its place.
Ranks that share no memory, each in its own container, are writers each for itself.
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
from contextlib import suppress
from pathlib import Path

MEMORY = Path("/dev/shm")
# Who publishes, and when it last did by the clock that all processes of a node share. Ranks count from 1; 0: no one.
HEADER = struct.Struct("<qd")
# Of one rank: step, number of its phase, time of its last sign of life.
SLOT = struct.Struct("<qqqd")
MISSED = 1.25  # intervals without a publication after which another rank takes over


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
