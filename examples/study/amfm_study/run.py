"""Run the cells of a study side by side: each is an `amfm train` below a Ray actor, and resumes from its checkpoint.

How it works: a slot is a GPU, or some cores; a dispatcher starts a waiting cell whenever one is free. Ray hands out
GPUs and notices lost processes; a cell is a separate process below a fresh actor, so that nothing one run does
reaches the next. The study keeps no state of its own: what is finished is read from run directories, so a second call
does what is missing.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from amfm.data_pipeline.durable.files import write_file_atomically
from amfm.data_pipeline.prepare.ray_actors import start_ray
from amfm.data_pipeline.progress import Waiting
from amfm.launch.cluster.local import forward_signals
from amfm.launch.cluster.node_logs import last_words
from amfm.launch.cluster.ray import RankHost, first_line
from amfm.launch.rank_command import rank_command
from amfm.pretrain.config.file import resolved_yaml, without_secrets
from amfm.pretrain.launcher_protocol import DONE, RUN_FAILED
from amfm_study.grid import Cell

POLL_SECONDS = 0.5
OBJECT_STORE_BYTES = 80 * 2**20  # Ray's smallest: nothing but paths and exit codes goes through it


@dataclass(frozen=True)
class CellEnd:
    """Exit code of a cell's process; `cause` is empty when it succeeded."""

    code: int
    cause: str = ""


@dataclass(frozen=True)
class Room:
    """Resources of the machine for runs: `slots` at once, `threads` each, on GPUs or cores."""

    slots: int
    threads: int
    gpus: bool


def find_room(threads_per_run: int, runs_at_once: int | None, num_gpus: int) -> Room:
    """Number of runs at once: as asked, else one per GPU, else as many as the cores hold with `threads_per_run` each.

    Raises ValueError for more than the machine holds.
    """
    # The affinity mask, because a container or a batch job may own a part of the machine.
    cores = len(os.sched_getaffinity(0))
    most, what = (num_gpus, f"{num_gpus} GPU(s)") if num_gpus else (cores // threads_per_run, f"{cores} core(s)")
    if (runs_at_once or 1) > most:
        raise ValueError(
            f"runs_at_once={runs_at_once or 1} with threads_per_run={threads_per_run} needs more than the {what} of this "
            f"machine; use at most {most} runs at once" + ("" if most else ", and fewer threads")
        )
    return Room(runs_at_once or most, threads_per_run, num_gpus > 0)


def run_cells(
    cells: Sequence[Cell],
    study_dir: Path,
    room: Room,
    *,
    begins: Callable[[Cell], None],
    ends: Callable[[Cell, CellEnd], None],
    polls: Callable[[], None],
) -> bool:
    """Run every cell to its end, a failed one too; returns False when a signal asked to stop before that.

    `begins` and `ends` hear of each cell, `polls` about twice a second. A signal continues to the running cells, which
    save and end; the rest do not start. Starts and stops its own Ray.
    """
    try:
        with Waiting("amfm study") as waiting:
            start_ray(None, waiting, num_cpus=room.slots * room.threads, object_store_memory=OBJECT_STORE_BYTES)
        return _Dispatcher(cells, study_dir, room, begins, ends).run(polls)
    finally:
        ray.shutdown()


class _Dispatcher:
    """Keeps every slot busy with one cell on its own actor: a crashed cell leaves nothing to the next."""

    def __init__(
        self,
        cells: Sequence[Cell],
        study_dir: Path,
        room: Room,
        begins: Callable[[Cell], None],
        ends: Callable[[Cell, CellEnd], None],
    ) -> None:
        self.waiting, self.study_dir, self.room = list(cells), study_dir, room
        self.begins, self.ends = begins, ends
        need = {"num_gpus": 1, "num_cpus": 0} if room.gpus else {"num_cpus": room.threads}
        self.host_class = ray.remote(max_concurrency=3, max_restarts=0, **need)(RankHost)
        self.running: dict[Any, tuple[Cell, Any]] = {}
        self.stopping = False

    def run(self, polls: Callable[[], None]) -> bool:
        """Run until nothing runs and nothing waits; False when a signal asked to stop."""
        with forward_signals(self._stop, (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)):
            while self.running or (self.waiting and not self.stopping):
                while self.waiting and not self.stopping and len(self.running) < self.room.slots:
                    self._start(self.waiting.pop(0))
                done, _ = ray.wait(list(self.running), num_returns=1, timeout=POLL_SECONDS)
                for answer in done:
                    self._finish(answer)
                polls()
        return not self.stopping

    def _start(self, cell: Cell) -> None:
        """Write a cell's resolved configuration, without secrets, and start `amfm train` on it."""
        path = self.study_dir / "configs" / f"{cell.name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file_atomically(path, resolved_yaml(without_secrets(cell.config)).encode())
        log_of(cell, self.study_dir).unlink(missing_ok=True)  # a cause is looked for in it
        threads = str(self.room.threads)
        # A fresh actor for each cell: Ray gives it its own GPU or cores, and they are free again once it is killed.
        host = self.host_class.remote()
        answer = host.run.remote(
            rank_command(["train", str(path)]),
            {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads},
            os.getcwd(),
            str(log_of(cell, self.study_dir)),
        )
        self.running[answer] = cell, host
        self.begins(cell)

    def _finish(self, answer: Any) -> None:
        """Take a cell's exit code and cause, and give its resources back."""
        cell, host = self.running.pop(answer)
        try:
            code = int(ray.get(answer))
            end = CellEnd(code, "" if code == DONE else last_words(log_of(cell, self.study_dir), code))
        except RayError as error:
            end = CellEnd(RUN_FAILED, f"its process was lost: {first_line(error)}")
        ray.kill(host)
        self.ends(cell, end)

    def _stop(self, number: int) -> None:
        """Ask every running cell to save and end, and start no more."""
        self.stopping = True
        # SIGTERM whatever the signal was: an interrupt too lets the runs save.
        for _, host in self.running.values():
            host.signal.remote(signal.SIGTERM)


def log_of(cell: Cell, study_dir: Path) -> Path:
    """Log file to which a cell's process writes."""
    return study_dir / "logs" / f"{cell.name}.log"
