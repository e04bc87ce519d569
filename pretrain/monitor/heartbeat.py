"""Each rank tells where it is, and a rank that gets no further for too long ends itself and names who holds it up.

A hung collective makes no noise: the rank that hangs may be stopped, asleep or waiting for data, and all others wait for
it. Every rank therefore has a thread that notes its step and phase on the board of its node (beats.py), of which one
rank writes a small file for all, `run.dir/heartbeats/rank-N.json` by the first of them, a line per rank; and another
thread that ends the process when the phase has not changed for `launch.heartbeat_seconds`. The launcher then ends
the attempt and starts the next one from the newest checkpoint. They are two, because storage may hang as well: the one
that ends the process touches no file before its time is over, and then waits a few seconds at most for what the files of
the others say. The first of them also asks the fence, if there is one, whether this start has been replaced by another
(ownership.py), and ends the process then. A file that cannot be written (full disk, folder removed) is tried again at the next beat.
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
from dataclasses import asdict
from pathlib import Path

from amfm.data_pipeline.durable.files import named
from amfm.pretrain.monitor.beats import LOOK_SECONDS as NEIGHBOUR_SECONDS
from amfm.pretrain.monitor.beats import (
    PHASES,
    SILENT_SECONDS,
    Beat,
    Neighbours,
    NodeBoard,
    describe_unseen,
    name_laggards,
    read_beats,
)
from amfm.pretrain.monitor.guard import Guard

HUNG = 3  # the exit code: the run failed and can be resumed
WRITE_SECONDS = 2.0
LOOK_SECONDS = 5.0  # for the words of the other ranks, from storage that may hang
MANY_RANKS = 512  # from which on one rank of a node reads what the other nodes published
LAST_WORDS = 1.5  # intervals between the last published beat of a rank that is dead and what it noted after it, at most


class Stall:
    """How long a rank has been awake without progress; `now` are seconds of a clock that only runs forward."""

    def __init__(self, interval: float, now: float) -> None:
        self.interval = interval
        self.awake_since = self.woken = now

    def measure(self, now: float, moved: float) -> float:
        """Seconds since it moved, asked every interval: one that was itself stopped (SIGSTOP) gets its time again."""
        if now - self.woken > 3 * self.interval:
            self.awake_since = now
        self.woken = now
        return now - max(moved, self.awake_since)


class Heartbeat:
    """The threads of one rank, from `start` to `close`. `at` costs an assignment; only a thread writes files.

    `timeout_seconds`: None only writes. What comes before the first step is not watched: collectives time out there.
    `fence`: raises RuntimeError when this process must not continue. `board`: of the ranks of this node, at first of only this
    one. Both are set before `start`.
    """

    def __init__(self, run_dir: Path, rank: int, timeout_seconds: float | None) -> None:
        self.directory = run_dir / "heartbeats"
        self.rank, self.timeout_seconds = rank, timeout_seconds
        self.interval = WRITE_SECONDS if timeout_seconds is None else min(WRITE_SECONDS, timeout_seconds / 4)
        self.listener: Callable[[str], None] | None = None  # hears of each phase that is entered
        self.fence: Callable[[], None] | None = None
        self.guard: Guard | None = None  # hears at each look that this process still runs Python
        self.board = NodeBoard(rank)
        self._own_file = self._file = self.directory / f"rank-{rank}.json"
        self._place = (0, PHASES[0], time.monotonic())
        self._closed = threading.Event()
        self._writer = threading.Thread(target=self._write_always, name="heartbeat", daemon=True)
        self._watcher = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._looker = threading.Thread(target=self._watch_neighbours, name="neighbours", daemon=True)

    def start(self) -> None:
        """Begin to write and to watch. Raises OSError if the first beat cannot be written."""
        self._write()
        self._writer.start()
        self._watcher.start()
        self._looker.start()

    def take_guard(self, guard: Guard) -> None:
        """Tell this guard from now on that the process runs Python, as often as the watchdog looks."""
        self.guard = guard
        guard.expect(self.timeout_seconds)

    def at(self, step: int, phase: str) -> None:
        """Note that this rank has entered a phase of a step; resets the watch."""
        assert phase in PHASES, phase
        self._place = (step, phase, time.monotonic())
        if self.listener is not None:
            self.listener(phase)

    def phase(self) -> str:
        """The phase that this rank has entered last."""
        return self._place[1]

    def find_lost(self, num_ranks: int) -> list[Beat]:
        """Find the ranks that are gone, as their last beats, for a rank whose collective failed.

        Waits for a sign of life of every rank, at most three of its intervals. Who ended in good order left no file. What a
        rank of another node noted before it died may be published late, and be one interval newer than the beat before:
        only a beat that is newer yet is a sign of life.
        """
        if self._writer.ident is None:
            return []
        step, phase, _ = self._place
        self._place = (step, phase, time.monotonic())  # looking is progress: the watch must not cut it short
        first: dict[int, Beat] = {}
        deadline = time.monotonic() + 3 * self.interval
        while True:
            mates = {rank for rank, *_ in self.board.read()}  # whose beats are known as soon as they are noted
            beats = self._other_beats(num_ranks)
            first = beats | first
            silent = [
                beat
                for rank, beat in beats.items()
                if beat.seen - first[rank].seen <= (0 if rank in mates else LAST_WORDS * self.interval)
            ]
            if not silent or time.monotonic() > deadline:
                return silent
            time.sleep(self.interval / 2)

    def _other_beats(self, num_ranks: int) -> dict[int, Beat]:
        """The last beats of the other ranks by rank: what nodes published, and what ranks of this node noted since.

        Of many ranks one of each node looks at the other nodes: where all fail together, all would open every node's file.
        """
        published = read_beats(self.directory) if self._may_read_beats() else []
        beats = {beat.rank: beat for beat in [*published, *self._node_beats()]}
        return {rank: beats[rank] for rank in sorted(beats) if rank < num_ranks and rank != self.rank}

    def _node_beats(self) -> list[Beat]:
        """The beats on the board of this node, in rank order."""
        host = socket.gethostname()
        return [Beat(rank, host, step, PHASES[phase], seen) for rank, step, phase, seen in self.board.read()]

    def _may_read_beats(self) -> bool:
        """Whether this rank may open the beats of all nodes."""
        return self.board.num_slots <= MANY_RANKS or self._leads()

    def _leads(self) -> bool:
        """Whether this rank is the first of its node that gives signs of life."""
        fresh = time.time() - 3 * self.interval
        return self.rank == min([self.rank, *(rank for rank, _, _, seen in self.board.read() if seen > fresh)])

    def close(self) -> None:
        """End the threads and remove the file; nothing happens without a start."""
        self._closed.set()
        if self._writer.ident is None:
            return
        self._watcher.join()
        if self.guard is not None:
            self.guard.expect(None)
        self._writer.join(LOOK_SECONDS)  # not for ever: it may hang in the storage
        self.board.clear()
        with suppress(OSError):  # a beat that stays is taken for a lost rank only while others still run
            self._publish()

    def _write(self) -> None:
        """Note this rank's beat, and publish those of the node where that is this rank's to do. Raises OSError."""
        step, phase, _ = self._place
        self.board.note(step, PHASES.index(phase), time.time())
        if self.board.claim(self.interval):
            self._publish()

    def _publish(self) -> None:
        """Write the beats of this node, renamed into place so that no reader sees a part of them. Raises OSError."""
        stale, beats = {self._file, self._own_file}, self._node_beats()
        if beats:
            self._file = self.directory / f"rank-{beats[0].rank}.json"
            stale.discard(self._file)
            self.directory.mkdir(parents=True, exist_ok=True)
            temporary = self.directory / f"rank-{self.rank}.tmp"  # of this rank: another may just take over
            temporary.unlink(missing_ok=True)  # whatever it is: a link is not followed
            with named(temporary), temporary.open("x", encoding="utf-8") as file:
                file.write("".join(json.dumps(asdict(beat)) + "\n" for beat in beats))
            os.replace(temporary, self._file)
        else:
            self.board.remove()
        for path in stale:  # a name of this node's file from before a lower rank came, or this one left
            path.unlink(missing_ok=True)

    def _write_always(self) -> None:
        """Write a beat every interval until `close`; the writer thread."""
        while not self._closed.wait(self.interval):
            with suppress(OSError):  # tried again at the next beat; training itself says what is wrong with the disk
                self._ask_fence()
                self._write()

    def _ask_fence(self) -> None:
        """End the process with its fence's words and HUNG when it may not continue; a collective may hold the main
        thread.
        """
        try:
            if self.fence is not None:
                self.fence()
        except RuntimeError as error:
            sys.stderr.write(f"amfm: rank {self.rank} on {socket.gethostname()}: {error}\n")
            sys.stderr.flush()
            os._exit(HUNG)

    def _watch(self) -> None:
        """End the process when the phase has not changed for `timeout_seconds` of being awake; the watchdog thread."""
        stall = Stall(self.interval, time.monotonic())
        while not self._closed.wait(self.interval):
            if self.guard is not None:
                self.guard.expect(self.timeout_seconds)
            seconds = stall.measure(time.monotonic(), self._place[2])
            if self.timeout_seconds is not None and seconds > self.timeout_seconds:
                what = f"no progress for {seconds:.0f} s (launch.heartbeat_seconds={self.timeout_seconds:g})"
                self._end(what, self._find_laggards())

    def _watch_neighbours(self) -> None:
        """End the process when it waits and a neighbour gives no sign of life; a thread that may hang in the storage."""
        if self.timeout_seconds is None:
            return
        neighbours = Neighbours(self.directory)
        while not self._closed.wait(NEIGHBOUR_SECONDS):
            waited = time.monotonic() - self._place[2]
            if waited < NEIGHBOUR_SECONDS or not self._leads():
                neighbours.forget()
                continue
            try:
                beats = neighbours.poll(self.rank, self._node_beats())
            except OSError:
                continue
            gone = [(beat, silent) for beat, silent in beats if silent > SILENT_SECONDS]
            if gone and time.monotonic() - self._place[2] > SILENT_SECONDS and not self._closed.is_set():
                self._end(f"no progress for {waited:.0f} s", describe_unseen(gone))

    def _end(self, what: str, who: str) -> None:
        """Report what this rank waited for and who holds it up, and end the process with HUNG."""
        step, phase, _ = self._place
        sys.stderr.write(f"amfm: rank {self.rank} on {socket.gethostname()}: {what} at step {step}, {phase}; {who}\n")
        # Where every thread stands tells a hung collective from a hung read. `_exit`, because a hung thread would keep
        # an orderly exit waiting.
        faulthandler.dump_traceback(all_threads=True)
        sys.stderr.flush()
        os._exit(HUNG)

    def _find_laggards(self) -> str:
        """Name who holds this rank up, by the beats of the others, if the storage gives them within LOOK_SECONDS."""
        if not self._may_read_beats():
            return name_laggards(self._node_beats(), self.rank, 3 * self.interval)
        found: list[list[Beat]] = []
        looker = threading.Thread(target=lambda: found.append(read_beats(self.directory)), daemon=True)
        try:
            looker.start()
        except RuntimeError as error:  # the system may reject threads, and this rank must end anyway
            return f"who holds it up was not read: {error}"
        looker.join(LOOK_SECONDS)
        if not found:
            return f"{self.directory} does not answer, so the storage is the suspect"
        return name_laggards(found[0], self.rank, 3 * self.interval)
