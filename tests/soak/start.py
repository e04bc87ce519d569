"""One start of the run: its processes, how far it is, and how it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from amfm.data_pipeline.durable.json_files import read_lines
from amfm.launch.rank_command import isolated_python, rank_command
from tests.soak.disk import fault, fault_variables
from tests.soak.processes import Process, descendants, find_ranks, send, wait_until_gone
from tests.soak.settings import Layout

POLL_SECONDS = 0.1
LOOK_SECONDS = 1.0
ORPHAN_SECONDS = 60.0
SLOW_BYTES_A_SECOND = 2e5


@dataclass
class Start:
    """A launcher at work on a run directory. `folder`: of the switches of its faults; `known`: all it ever started.

    `trail`: (moment of the monotonic clock, step), a point whenever the run had got further.
    """

    layout: Layout
    run_dir: Path
    folder: Path
    process: subprocess.Popen[bytes]
    known: set[Process] = field(default_factory=set)
    trail: list[tuple[float, int]] = field(default_factory=list)

    @classmethod
    def begin(cls, layout: Layout, config: Path, run_dir: Path, folder: Path, number: int) -> Start:
        """Start the run again, or for the first time. Its words go to `start-NUMBER.log` next to the run directory."""
        folder.mkdir(parents=True, exist_ok=True)
        for switch in folder.iterdir():
            switch.unlink()
        variables = dict(os.environ)
        if layout.on_ray:
            options = ["--on", "ray", "--nproc-per-node", str(layout.num_ranks)]
            command = rank_command(["launch", str(config), *options])
            # Ray lets whatever else runs here go first, so that ranks would look hung.
            variables["RAY_worker_niceness"] = "0"
        else:
            arguments = [str(folder), str(layout.num_ranks), str(config)]
            command = [*isolated_python(), str(Path(__file__).with_name("child.py")), *arguments]
            variables |= fault_variables(list_rules(run_dir, folder))
        with (run_dir.parent / f"{run_dir.name}-start-{number:03d}.log").open("wb") as log:
            process = subprocess.Popen(
                command, env=variables, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        return cls(layout, run_dir, folder, process)

    def code(self) -> int | None:
        """Exit code of the launcher, None while it runs."""
        return self.process.poll()

    def ranks(self) -> dict[int, Process]:
        """Processes of the ranks that run now."""
        found = descendants(self.process.pid)
        self.known.update(found)
        return find_ranks(found)

    def clear_away(self) -> list[Process]:
        """Wait until everything that was started is gone, kill what stays, and return the ranks among that: orphans."""
        left = wait_until_gone(self.known, ORPHAN_SECONDS)
        orphans = list(find_ranks(left).values())
        send(left, signal.SIGKILL)
        return orphans

    def kill(self) -> None:
        """End everything at once, if anything is left; for the way out of a soak that failed or is interrupted."""
        if self.process.poll() is None:
            self.known.update(descendants(self.process.pid))
            self.process.kill()
            self.process.wait()
        send(self.known, signal.SIGKILL)


def list_rules(run_dir: Path, folder: Path) -> list[str]:
    """Faults of the disk below a run's checkpoints, each on while its switch is there."""
    pattern = f"{run_dir}/checkpoints/*"
    return [
        fault("write", pattern, f"rate={SLOW_BYTES_A_SECOND:g}", when=folder / "slow"),
        fault("write", pattern, "ENOSPC", when=folder / "full"),
    ]


@dataclass(frozen=True)
class Place:
    """How far a run is: starts so far, the step that the newest one began at, and the newest step that is logged."""

    starts: int
    began_at: int
    step: int


def read_place(run_dir: Path) -> Place:
    """Read how far a run is from its logs."""
    starts = read_starts(run_dir)
    steps = [int(line["step"]) for line in read_log(run_dir / "metrics.jsonl")]
    return Place(len(starts), starts[-1] if starts else 0, max(steps, default=0))


def read_starts(run_dir: Path) -> list[int]:
    """Read the steps at which the starts of a run continued, in order, from its events."""
    return [int(event["step"]) for event in read_log(run_dir / "events.jsonl") if event.get("event") == "start"]


def read_log(path: Path) -> list[dict[str, Any]]:
    """Read the whole lines of a log, which may be in the middle of being written or replaced."""
    return [line for _, line in read_lines(path) if line is not None] if path.exists() else []


def wait_for(start: Start, starts: int, at_step: int, new_steps: int, seconds: float) -> bool:
    """Wait until the run was started more than `starts` times and made new steps, counted from where it began or `at_step`.

    False when it ends instead. Raises RuntimeError when it gets no further for so long.
    """
    deadline, seen, looked = time.monotonic() + seconds, Place(-1, 0, 0), 0.0
    while start.code() is None:
        if time.monotonic() > looked + LOOK_SECONDS:  # what dies with the launcher can be found only before it does
            looked = time.monotonic()
            start.ranks()
        place = read_place(start.run_dir)
        if place != seen:
            deadline, seen = time.monotonic() + seconds, place
            start.trail.append((time.monotonic(), place.step))
        if place.starts > starts and place.step >= max(place.began_at, at_step) + new_steps:
            return True
        if time.monotonic() > deadline:
            raise RuntimeError(f"{start.run_dir} made no progress for {seconds:.0f} s, at step {place.step}")
        time.sleep(POLL_SECONDS)
    return False


def wait_for_end(start: Start, seconds: float) -> None:
    """Wait until the launcher ends. Raises RuntimeError when its run gets no further for so long."""
    endless = sys.maxsize
    wait_for(start, endless, 0, 0, seconds)
