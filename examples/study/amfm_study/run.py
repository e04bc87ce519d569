"""Run the cells of a study side by side: each is an `amfm train` below a Ray actor or a job of Slurm, and resumes from its checkpoint.

How it works: a slot is a GPU, or some cores; a dispatcher starts a waiting cell whenever one is free. Ray hands out
GPUs and notices lost processes; a cell is a separate process below a fresh actor, so that nothing one run does
reaches the next. Slurm has a job for each. The study keeps no state of its own: what is finished is read from run directories, so a second call
does what is missing.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import ray
from ray.exceptions import RayError

from amfm.data_pipeline.durable.files import write_file_atomically
from amfm.data_pipeline.prepare.ray_actors import start_ray
from amfm.data_pipeline.terminal import Waiting
from amfm.launch.cluster.local import forward_signals
from amfm.launch.cluster.node_logs import last_words
from amfm.launch.cluster.ray import RankHost, first_line
from amfm.launch.cluster.slurm import log_file, submit, write_script
from amfm.launch.rank_command import rank_command
from amfm.pretrain.config.file import resolved_yaml, without_secrets
from amfm.pretrain.launcher_protocol import DONE, RUN_FAILED
from amfm_study.grid import Cell

POLL_SECONDS = 0.5
QUEUE_SECONDS = 5.0  # between two questions to Slurm's controller
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


class Host(Protocol):
    """Where runs are processes: it starts one, says which ended and how, and asks all to save and end."""

    def start(self, cell: Cell, config: Path, log: Path) -> Any:
        """Start `amfm train` on a configuration; returns what stands for the run."""

    def ended(self, running: Sequence[Any]) -> list[Any]:
        """Wait for POLL_SECONDS at most; which of them have ended."""

    def end_of(self, run: Any, log: Path) -> CellEnd:
        """How one that ended did."""

    def stop(self, running: Sequence[Any]) -> None:
        """A signal asked to stop: runs save and end, or stay with the queue that has them."""

    @property
    def waits_when_stopped(self) -> bool:
        """Whether running ones are waited for after that."""


def run_cells(
    cells: Sequence[Cell],
    study_dir: Path,
    room: Room,
    *,
    begins: Callable[[Cell], None],
    ends: Callable[[Cell, CellEnd], None],
    polls: Callable[[], None],
    on: Literal["local", "ray", "slurm"] = "local",
    ray_address: str | None = None,
) -> bool:
    """Run every cell to its end, a failed one too; returns False when a signal asked to stop before that.

    `begins` and `ends` hear of each cell, `polls` about twice a second. A signal continues to the running cells, which
    save and end; the rest do not start. Starts and stops its own Ray, or joins the cluster at `ray_address`.
    """
    if on == "slurm":
        return _Dispatcher(cells, study_dir, room, begins, ends, SlurmHost()).run(polls)
    own: dict[str, Any] = {"num_cpus": room.slots * room.threads, "object_store_memory": OBJECT_STORE_BYTES}
    try:
        with Waiting("amfm study") as waiting:
            start_ray(ray_address if on == "ray" else None, waiting, **(own if on == "local" else {}))
        return _Dispatcher(cells, study_dir, room, begins, ends, RayHost(room)).run(polls)
    finally:
        ray.shutdown()


class RayHost:
    """Each run on its own actor, of this machine's Ray or of a cluster: a crashed run leaves nothing to the next."""

    waits_when_stopped = True

    def __init__(self, room: Room) -> None:
        gpus = room.gpus or bool(ray.cluster_resources().get("GPU"))
        need = {"num_gpus": 1, "num_cpus": 0} if gpus else {"num_cpus": room.threads}
        self.threads = str(room.threads)
        self.host_class = ray.remote(max_concurrency=3, max_restarts=0, **need)(RankHost)

    def start(self, cell: Cell, config: Path, log: Path) -> Any:
        """On a fresh actor: Ray gives it its own GPU or cores, and they are free again once it is killed."""
        host = self.host_class.remote()
        variables = {"OMP_NUM_THREADS": self.threads, "MKL_NUM_THREADS": self.threads}
        return host.run.remote(rank_command(["train", str(config)]), variables, os.getcwd(), str(log)), host

    def ended(self, running: Sequence[Any]) -> list[Any]:
        """Ask Ray, which notices lost processes too."""
        done, _ = ray.wait([answer for answer, _ in running], num_returns=1, timeout=POLL_SECONDS)
        return [run for run in running if run[0] in done]

    def end_of(self, run: Any, log: Path) -> CellEnd:
        """The exit code and its cause; gives the resources back."""
        answer, host = run
        try:
            code = int(ray.get(answer))
            end = CellEnd(code, "" if code == DONE else last_words(log, code))
        except RayError as error:
            end = CellEnd(RUN_FAILED, f"its process was lost: {first_line(error)}")
        ray.kill(host)
        return end

    def stop(self, running: Sequence[Any]) -> None:
        """SIGTERM whatever the signal was: an interrupt too lets the runs save."""
        for _, host in running:
            host.signal.remote(signal.SIGTERM)


class SlurmHost:
    """Each run a job of one rank, as `amfm launch --on slurm` submits it, with the settings of `launch.slurm`.

    A job that is queued already is waited for and not submitted twice, so a study that was stopped finds its jobs again.
    """

    waits_when_stopped = False

    def __init__(self) -> None:
        self.asked = 0.0

    def start(self, cell: Cell, config: Path, log: Path) -> Any:
        """Submit the run, or find its job."""
        run, name = cell.config, "job"
        script = (Path(run.run.dir) / "launch" / f"{name}.sbatch").absolute()
        job = self._jobs().get(str(script))
        if job is None:
            arguments = ["launch", str(config), "--on", "slurm", "--nodes", "1", "--nproc-per-node", "1"]
            text = write_script(run, arguments, ["train", str(config)], nodes=1, ranks_per_node=1)
            job = submit(run, text, name).rsplit(maxsplit=1)[-1]
        self.asked = 0.0
        return job, log_file(run, job)

    def ended(self, running: Sequence[Any]) -> list[Any]:
        """Those that the queue no longer has."""
        time.sleep(POLL_SECONDS)
        if time.monotonic() - self.asked < QUEUE_SECONDS:
            return []
        jobs = set(self._jobs().values())
        return [run for run in running if run[0] not in jobs]

    def end_of(self, run: Any, log: Path) -> CellEnd:
        """The exit code that Slurm's accounting or the job's record has; the last words of its log where it failed."""
        job, job_log = run
        shown = subprocess.run(["scontrol", "show", "job", job], capture_output=True, text=True, check=False).stdout
        found = re.search(r"ExitCode=(\d+):(\d+)", shown)
        failed = re.search(r"JobState=(\w+)", shown)
        code = int(found[1]) or int(found[2]) if found else DONE
        if code == DONE and (failed is None or failed[1] == "COMPLETED"):
            return CellEnd(DONE)  # whether all its steps are done, its run directory says
        return CellEnd(code or RUN_FAILED, f"job {job}: {last_words(job_log, code or RUN_FAILED)}")

    def stop(self, running: Sequence[Any]) -> None:
        """Jobs stay with Slurm; the same command waits for them."""

    def _jobs(self) -> dict[str, str]:
        """The user's jobs that have not ended, by script. Raises RuntimeError if Slurm does not answer."""
        try:
            done = subprocess.run(
                ["squeue", "--me", "--noheader", "--format=%i %o"], capture_output=True, text=True, check=True
            )
        except FileNotFoundError as error:
            raise RuntimeError("squeue is not on this machine; run this on a login node, or use on: local") from error
        except subprocess.CalledProcessError as error:
            raise RuntimeError(f"squeue failed: {error.stderr.strip()}; run the same command to continue") from error
        self.asked = time.monotonic()
        lines = (line.split(maxsplit=1) for line in done.stdout.splitlines())
        return {words[1].strip(): words[0] for words in lines if len(words) == 2}


class _Dispatcher:
    """Keeps every slot busy with one cell."""

    def __init__(
        self,
        cells: Sequence[Cell],
        study_dir: Path,
        room: Room,
        begins: Callable[[Cell], None],
        ends: Callable[[Cell, CellEnd], None],
        host: Host,
    ) -> None:
        self.waiting, self.study_dir, self.room, self.host = list(cells), study_dir, room, host
        self.begins, self.ends = begins, ends
        self.running: list[tuple[Cell, Any]] = []
        self.stopping = False

    def run(self, polls: Callable[[], None]) -> bool:
        """Run until nothing runs and nothing waits; False when a signal asked to stop."""
        with forward_signals(self._stop, (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)):
            while self.running or (self.waiting and not self.stopping):
                while self.waiting and not self.stopping and len(self.running) < self.room.slots:
                    self._start(self.waiting.pop(0))
                done = self.host.ended([run for _, run in self.running])
                for cell, run in [entry for entry in self.running if entry[1] in done]:
                    self.running.remove((cell, run))
                    self.ends(cell, self.host.end_of(run, log_of(cell, self.study_dir)))
                if self.stopping and not self.host.waits_when_stopped:
                    break
                polls()
        return not self.stopping

    def _start(self, cell: Cell) -> None:
        """Write a cell's resolved configuration, without secrets, and start `amfm train` on it."""
        path = self.study_dir / "configs" / f"{cell.name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file_atomically(path, resolved_yaml(without_secrets(cell.config)).encode())
        log = log_of(cell, self.study_dir)
        log.unlink(missing_ok=True)  # a cause is looked for in it
        self.running.append((cell, self.host.start(cell, path, log)))
        self.begins(cell)

    def _stop(self, number: int) -> None:
        """Ask every running cell to save and end, and start no more."""
        self.stopping = True
        self.host.stop([run for _, run in self.running])


def log_of(cell: Cell, study_dir: Path) -> Path:
    """Log file to which a cell's process writes."""
    return study_dir / "logs" / f"{cell.name}.log"
