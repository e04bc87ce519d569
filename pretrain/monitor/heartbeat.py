"""Each rank tells where it is, and a rank that gets no further for too long ends itself and names who holds it up.

A hung collective makes no noise: the rank that hangs may be stopped, asleep or waiting for data, and all others wait for
it. Every rank therefore has a thread that writes a small file, `run.dir/heartbeats/rank-N.json`, with step and phase,
and another that ends the process when the phase has not changed for `launch.heartbeat_seconds`. The launcher then ends
the attempt and starts the next one from the newest checkpoint. They are two, because storage may hang as well: the one
that ends the process touches no file before its time is over, and then waits a few seconds at most for what the files of
the others say. The first of them also asks the fence, if there is one, whether this start has been replaced by another
(ownership.py), and ends the process then. A file that can't be written (full disk, folder removed) is tried again at the next beat.
"""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, astuple, dataclass
from pathlib import Path

from data_pipeline.lines import parse_line

# In the order in which a step passes them: who is in an earlier one than the others is waited for.
PHASES = ("start", "data", "forward", "reduce", "optimizer", "validate", "save")
HUNG = 3  # the exit code: the run failed and can be resumed
WRITE_SECONDS = 2.0
LOOK_SECONDS = 5.0  # for the words of the other ranks, from storage that may hang
MAX_BEAT_BYTES = 4096


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


class Heartbeat:
    """The threads of one rank, from `start` to `close`. `at` costs an assignment; a thread alone writes files.

    `timeout_seconds`: None only writes. What comes before the first step is not watched: collectives time out there.
    `fence`: raises RuntimeError when this process must not go on; set before `start`.
    """

    def __init__(self, run_dir: Path, rank: int, timeout_seconds: float | None) -> None:
        self.directory = run_dir / "heartbeats"
        self.rank, self.timeout_seconds = rank, timeout_seconds
        self.interval = WRITE_SECONDS if timeout_seconds is None else min(WRITE_SECONDS, timeout_seconds / 4)
        self.listener: Callable[[str], None] | None = None  # hears of each phase that is entered
        self.fence: Callable[[], None] | None = None
        self._place = (0, PHASES[0], time.monotonic())
        self._closed = threading.Event()
        self._writer = threading.Thread(target=self._write_always, name="heartbeat", daemon=True)
        self._watcher = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        """Begin to write and to watch. Raises OSError where the first beat can't be written."""
        self._write()
        self._writer.start()
        self._watcher.start()

    def at(self, step: int, phase: str) -> None:
        """Note that this rank has entered a phase of a step; resets the watch."""
        self._place = (step, phase, time.monotonic())
        if self.listener is not None:
            self.listener(phase)

    def find_lost(self, num_ranks: int) -> list[Beat]:
        """Find the ranks that are gone, as their last beats, for a rank whose collective failed.

        Waits for a sign of life of every rank, at most three of its intervals. Who ended in good order left no file.
        """
        if self._writer.ident is None:
            return []
        silent = {beat.rank: beat for beat in read_beats(self.directory) if beat.rank < num_ranks}
        silent.pop(self.rank, None)  # on a full disk, or where somebody removed it, there is none
        deadline = time.monotonic() + 3 * self.interval
        while silent and time.monotonic() < deadline:
            time.sleep(self.interval / 2)
            # Only of ranks that have not beaten since: all ranks look at once, and each file they ask for is an open.
            silent = {rank: beat for rank, beat in silent.items() if read_beat(self._path(rank)) == beat}
        return list(silent.values())

    def close(self) -> None:
        """End the threads and remove the file; nothing happens without a start."""
        self._closed.set()
        if self._writer.ident is None:
            return
        self._watcher.join()
        self._writer.join(LOOK_SECONDS)  # not for ever: it may hang in the storage
        with suppress(OSError):  # a beat that stays is taken for a lost rank only while others still run
            self._path(self.rank).unlink(missing_ok=True)

    def _path(self, rank: int) -> Path:
        return self.directory / f"rank-{rank}.json"

    def _write(self) -> None:
        """Write this rank's beat, renamed into place so that no reader sees a part of it. Raises OSError."""
        step, phase, _ = self._place
        beat = Beat(self.rank, socket.gethostname(), step, phase, time.time())
        self.directory.mkdir(parents=True, exist_ok=True)
        temporary = self._path(self.rank).with_suffix(".tmp")
        temporary.write_text(json.dumps(asdict(beat)), encoding="utf-8")
        os.replace(temporary, self._path(self.rank))

    def _write_always(self) -> None:
        """Write a beat every interval until `close`; the writer thread."""
        while not self._closed.wait(self.interval):
            with suppress(OSError):  # tried again at the next beat; training itself says what is wrong with the disk
                self._ask_fence()
                self._write()

    def _ask_fence(self) -> None:
        """End the process with its fence's words and HUNG when it may not go on; a collective may hold the main thread."""
        try:
            if self.fence is not None:
                self.fence()
        except RuntimeError as error:
            sys.stderr.write(f"amfm: rank {self.rank} on {socket.gethostname()}: {error}\n")
            sys.stderr.flush()
            os._exit(HUNG)

    def _watch(self) -> None:
        """End the process when the phase has not changed for `timeout_seconds` of being awake; the watchdog thread."""
        awake_since = woken = time.monotonic()
        while not self._closed.wait(self.interval):
            before, woken = woken, time.monotonic()
            if woken - before > 3 * self.interval:  # the process was itself stopped (SIGSTOP): it gets its time again
                awake_since = woken
            seconds = woken - max(self._place[2], awake_since)
            if self.timeout_seconds is not None and seconds > self.timeout_seconds:
                self._end(seconds)

    def _end(self, seconds: float) -> None:
        """Say what this rank waited for and who holds it up, and end the process with HUNG."""
        step, phase, _ = self._place
        sys.stderr.write(
            f"amfm: rank {self.rank} on {socket.gethostname()}: no progress for {seconds:.0f} s "
            f"(launch.heartbeat_seconds={self.timeout_seconds:g}) at step {step}, {phase}; {self._look_around()}\n"
        )
        # Where every thread stands tells a hung collective from a hung read. `_exit`, because a hung thread would keep
        # an orderly exit waiting.
        faulthandler.dump_traceback(all_threads=True)
        sys.stderr.flush()
        os._exit(HUNG)

    def _look_around(self) -> str:
        """Name who holds this rank up, by the beats of the others, if the storage gives them within LOOK_SECONDS."""
        found: list[list[Beat]] = []
        looker = threading.Thread(target=lambda: found.append(read_beats(self.directory)), daemon=True)
        looker.start()
        looker.join(LOOK_SECONDS)
        if not found:
            return f"{self.directory} does not answer, so the storage is the suspect"
        return name_laggards(found[0], self.rank, 3 * self.interval)


def read_beats(directory: Path) -> list[Beat]:
    """Read the last beat of every rank that has not ended in good order, in rank order; what can't be read is left out."""
    beats = [beat for path in directory.glob("rank-*.json") if (beat := read_beat(path)) is not None]
    return sorted(beats, key=lambda beat: beat.rank)


def read_beat(path: Path) -> Beat | None:
    """Read the last beat of one rank; None where it ended just now, or the file is not what a rank wrote."""
    try:
        with path.open("rb") as file:
            beat = Beat(**(parse_line(file.read(MAX_BEAT_BYTES)) or {}))
    except (OSError, TypeError):
        return None
    kinds: tuple[type | tuple[type, ...], ...] = (int, str, int, str, (int, float))
    is_whole = beat.phase in PHASES and all(isinstance(value, kind) for value, kind in zip(astuple(beat), kinds))
    return beat if is_whole else None


def describe_lost(beats: list[Beat]) -> str:
    """Describe lost ranks, with host, step and phase; empty for none."""
    return ", ".join(
        f"rank {beat.rank} on {beat.host} is lost (last seen at step {beat.step}, {beat.phase})" for beat in beats
    )


def name_laggards(beats: list[Beat], own_rank: int, unseen_seconds: float) -> str:
    """Name the ranks that the others wait for: those not seen for so long (stopped or gone), else those that are behind."""
    now = time.time()
    gone = [beat for beat in beats if now - beat.seen > unseen_seconds and beat.rank != own_rank]
    if gone:
        return "not seen any more: " + ", ".join(
            f"rank {beat.rank} on {beat.host} (for {now - beat.seen:.0f} s, last at step {beat.step}, {beat.phase})"
            for beat in gone
        )
    furthest = max((beat.place() for beat in beats), default=(0, 0))
    behind = [beat for beat in beats if beat.place() < furthest]
    if behind:
        return "behind the others: " + ", ".join(
            f"rank {beat.rank} on {beat.host} (at step {beat.step}, {beat.phase})" for beat in behind
        )
    if furthest[1] == PHASES.index("data"):
        return "all ranks wait for data, so the storage of data.store is the suspect"
    return "all ranks are at the same place, so the network between them is the suspect"
