"""What a launcher does besides launching, by the run's files: it posts messages (notify.py) and exports checkpoints (exports.py).

A thread looks at the run directory as `amfm watch` does. Ranks know nothing of it, and what fails in it ends no run.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from amfm.launch.exports import build_exporter
from amfm.launch.notify import build_notifier
from amfm.pretrain.config.schema import RunConfig
from amfm.pretrain.monitor.follow import FollowedRun, Seen

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
                newest[:] = [run.look()]
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
