"""Beats: where ranks are, as nodes publish them, and who holds up the others by them."""

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
