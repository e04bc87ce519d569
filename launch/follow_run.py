"""What a launcher does besides launching, by the run's files: it posts messages (notify.py) and exports checkpoints.

A thread looks at the run directory as `amfm watch` does. Ranks know nothing of it, and what fails in it ends no run.

Exports checkpoints while a run trains (`export.every_steps`): each in a process of its own, one at a time, out of the way.

The process is `amfm export`, at the lowest priority, with one thread and without GPUs, on the launcher's host. Steps do not wait
for it, and what fails in it is said and tried no second time: the checkpoint stands, and can be exported by hand.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from amfm.launch.console import say
from amfm.launch.notify import build_notifier
from amfm.pretrain.checkpoint.names import checkpoint_name
from amfm.pretrain.config.schema import RunConfig
from amfm.pretrain.monitor.follow import FollowedRun, Seen

FOLDER = "exports"  # below the run directory
OUT_OF_THE_WAY = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


class Exporter:
    """Exports checkpoints of every `every_steps` steps to RUN/exports/step-N, each once: what is there is kept."""

    def __init__(self, run_dir: Path, every_steps: int) -> None:
        self.run_dir, self.every_steps = run_dir, every_steps
        self.waiting: deque[str] = deque()
        self.running: tuple[str, subprocess.Popen[str]] | None = None

    def take(self, seen: Seen) -> None:
        """Note checkpoints that a look found, see whether the process has ended, and start the next one."""
        for event in seen.events:
            step = event.get("step")
            if event.get("event") == "checkpoint" and isinstance(step, int) and step % self.every_steps == 0:
                self.waiting.append(checkpoint_name(step))
        if self.running is not None and self.running[1].poll() is not None:
            self.conclude()
        while self.running is None and self.waiting:
            self.start(self.waiting.popleft())

    def start(self, name: str) -> None:
        """Start to export a checkpoint, unless it was exported, or pruned while others were."""
        checkpoint, out = self.run_dir / "checkpoints" / name, self.run_dir / FOLDER / name
        if out.exists() or not checkpoint.is_dir():
            return
        out.parent.mkdir(exist_ok=True)
        command = [sys.executable, "-P", "-m", "amfm.launch", "export", str(checkpoint), str(out)]
        process = subprocess.Popen(
            ["nice", "-n", "19", *command],
            env=os.environ | OUT_OF_THE_WAY,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.running = name, process

    def conclude(self) -> None:
        """Wait for the process, and say how it ended."""
        assert self.running is not None, "one was started"
        (name, process), self.running = self.running, None
        lines = (process.communicate()[1] or "").strip().splitlines()
        if process.returncode == 0:
            say(f"amfm: exported {name} to {self.run_dir / FOLDER / name}")
        else:
            reason = lines[-1] if lines else f"code {process.returncode}"
            say(f"amfm: warning: {name} was not exported, training continues: {reason}")

    def leave(self, seen: Seen | None) -> None:
        """Export what is left of a run that is finished; else end the process, for the launcher may have to go at once."""
        if seen is not None and seen.state == "finished":
            while self.running is not None or self.waiting:
                if self.running is None:
                    self.start(self.waiting.popleft())
                else:
                    self.conclude()
        elif self.running is not None:
            self.running[1].terminate()
            self.running[1].communicate()


def build_exporter(config: RunConfig) -> Exporter | None:
    """What exports, where the run asks for it."""
    every = config.export.every_steps
    return None if every is None else Exporter(Path(config.run.dir), every)


POLL_SECONDS, LEAVING_SECONDS = 5.0, 20.0


class Follower(Protocol):
    """Is given every look at the run, and the last one again when the launcher ends."""

    def take(self, seen: Seen) -> None:
        """Act on what a look found."""

    def leave(self, seen: Seen | None) -> None:
        """Finish; seen: None if there never was a run to look at."""


@contextmanager
def following(config: RunConfig) -> Iterator[None]:
    """Inside the block, and a moment after it, followers that the configuration asks for see the run. Raises ValueError as they do."""
    built = (build_notifier(config), build_exporter(config))
    followers: list[Follower] = [each for each in built if each is not None]
    if not followers:
        yield
        return
    ended = threading.Event()
    newest: list[Seen] = []

    def work() -> None:
        run: FollowedRun | None = None
        is_last = False
        while not is_last:
            is_last = ended.wait(POLL_SECONDS)
            try:
                run = run or FollowedRun(Path(config.run.dir))
                newest[:] = [run.poll()]
            except (OSError, ValueError):
                continue  # not there yet, being written, or storage that is away: the run itself says so
            for follower in followers:
                follower.take(newest[0])

    thread = threading.Thread(target=work, name="follow-run", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(LEAVING_SECONDS)
        for follower in followers:
            follower.leave(newest[0] if newest else None)
