"""Each rank tells where it is, and a rank that gets no further for too long ends itself and names who holds it up.

A hung collective makes no noise: the rank that hangs may be stopped, asleep or waiting for data, and all others wait for
it. Every rank therefore has a thread that writes a small file, `run.dir/heartbeats/rank-N.json`, with step and phase,
and that ends the process when the phase has not changed for `launch.heartbeat_seconds`. The launcher then ends the
attempt and starts the next one from the newest checkpoint.
"""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

# In the order in which a step passes them: who is in an earlier one than the others is waited for.
PHASES = ("start", "data", "forward", "reduce", "optimizer", "validate", "save")
HUNG = 3  # the exit code: the run failed and can be resumed
WRITE_SECONDS = 2.0


@dataclass(frozen=True)
class Beat:
    """Where one rank is: in which phase of which step, and when it was last seen (seconds since the epoch)."""

    rank: int
    host: str
    step: int
    phase: str
    seen: float

    def place(self) -> tuple[int, int]:
        """Sorts ranks by how far they are."""
        return self.step, PHASES.index(self.phase)


class Heartbeat:
    """The thread of one rank, from `start` to `close`. `at` costs an assignment; the thread alone writes files.

    `timeout_seconds`: None only writes. What comes before the first step is not watched: collectives time out there.
    """

    def __init__(self, run_dir: Path, rank: int, timeout_seconds: float | None) -> None:
        self.directory = run_dir / "heartbeats"
        self.rank, self.timeout_seconds = rank, timeout_seconds
        self.interval = WRITE_SECONDS if timeout_seconds is None else min(WRITE_SECONDS, timeout_seconds / 4)
        self._place = (0, PHASES[0], time.monotonic())
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Begin to write and to watch."""
        self.directory.mkdir(parents=True, exist_ok=True)
        self._write()
        self._thread.start()

    def at(self, step: int, phase: str) -> None:
        """This rank has come to a phase of a step."""
        self._place = (step, phase, time.monotonic())

    def find_lost(self, num_ranks: int) -> list[Beat]:
        """The last words of ranks that are gone, for a rank whose collective failed: it says which ones it missed.

        Waits for a sign of life of every rank, at most three of its intervals. Who ended in good order left no file.
        """
        if self._thread.ident is None:
            return []
        silent = {beat.rank: beat for beat in read_beats(self.directory) if beat.rank < num_ranks}
        del silent[self.rank]
        deadline = time.monotonic() + 3 * self.interval
        while silent and time.monotonic() < deadline:
            time.sleep(self.interval / 8)
            seen = {beat.rank: beat.seen for beat in read_beats(self.directory)}
            silent = {rank: beat for rank, beat in silent.items() if seen.get(rank) == beat.seen}
        return list(silent.values())

    def close(self) -> None:
        """End the thread and remove the file; nothing happens without a start."""
        self._closed.set()
        if self._thread.ident is None:
            return
        self._thread.join()
        self._path(self.rank).unlink(missing_ok=True)

    def _path(self, rank: int) -> Path:
        return self.directory / f"rank-{rank}.json"

    def _write(self) -> None:
        step, phase, _ = self._place
        beat = Beat(self.rank, socket.gethostname(), step, phase, time.time())
        temporary = self._path(self.rank).with_suffix(".tmp")
        temporary.write_text(json.dumps(asdict(beat)), encoding="utf-8")
        os.replace(temporary, self._path(self.rank))

    def _watch(self) -> None:
        awake_since = woken = time.monotonic()
        while not self._closed.wait(self.interval):
            before, woken = woken, time.monotonic()
            if woken - before > 3 * self.interval:  # the process was itself stopped (SIGSTOP): it gets its time again
                awake_since = woken
            self._write()
            seconds = woken - max(self._place[2], awake_since)
            if self.timeout_seconds is not None and seconds > self.timeout_seconds:
                self._end(seconds)

    def _end(self, seconds: float) -> None:
        step, phase, _ = self._place
        sys.stderr.write(
            f"amfm: rank {self.rank} on {socket.gethostname()}: no progress for {seconds:.0f} s "
            f"(launch.heartbeat_seconds={self.timeout_seconds:g}) at step {step}, {phase}; "
            f"{name_laggards(read_beats(self.directory), self.rank, 3 * self.interval)}\n"
        )
        faulthandler.dump_traceback(all_threads=True)
        sys.stderr.flush()
        os._exit(HUNG)


def read_beats(directory: Path) -> list[Beat]:
    """The last word of every rank that has not ended in good order, in rank order."""
    beats = []
    for path in directory.glob("rank-*.json"):
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:  # it ended just now
            continue
        beats.append(Beat(**json.loads(text)))
    return sorted(beats, key=lambda beat: beat.rank)


def describe_lost(beats: list[Beat]) -> str:
    """Lost ranks, with host and place."""
    return ", ".join(
        f"rank {beat.rank} on {beat.host} is lost (last seen at step {beat.step}, {beat.phase})" for beat in beats
    )


def name_laggards(beats: list[Beat], own_rank: int, unseen_seconds: float) -> str:
    """Which ranks the others wait for: those not seen for so long (stopped or gone), else those that are behind."""
    now = time.time()
    gone = [beat for beat in beats if now - beat.seen > unseen_seconds and beat.rank != own_rank]
    if gone:
        return "not seen any more: " + ", ".join(
            f"rank {beat.rank} on {beat.host} (for {now - beat.seen:.0f} s, last at step {beat.step}, {beat.phase})"
            for beat in gone
        )
    furthest = max(beat.place() for beat in beats)
    behind = [beat for beat in beats if beat.place() < furthest]
    if behind:
        return "behind the others: " + ", ".join(
            f"rank {beat.rank} on {beat.host} (at step {beat.step}, {beat.phase})" for beat in behind
        )
    return "all ranks are at the same place, so the network between them is the suspect"
