"""What an onlooker knows of a run, without what the run says of itself: when each step's line came, and when Slurm held nodes."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median

from amfm.pretrain.report.data import read_run
from amfm.pretrain.report.goodput import measure_goodput
from tests.cluster.cluster import events, metrics
from tests.cluster.soak.site import SAVED_EVERY_STEPS, Site

LOOK_SECONDS = 0.05
MOVING_SECONDS = 15.0
NEW_STEPS = 3  # of a start before it is hurt


@dataclass
class Onlooker:
    """Looks at a run again and again. `seen`: moment and number of starts when a step's newest line came; `held`: seconds."""

    seen: dict[int, tuple[float, int]] = field(default_factory=dict)
    held: float = 0.0
    trail: list[tuple[float, int]] = field(default_factory=list)
    starts: int = 0
    began_at: int = 0
    step: int = 0
    moved: float = 0.0
    _steps: set[int] = field(default_factory=set)
    _size: int = -1

    @contextmanager
    def watching(self, run_dir: Path) -> Iterator[None]:
        """Look from a thread, whatever the block waits for."""
        ended = threading.Event()

        def look_always() -> None:
            while not ended.wait(LOOK_SECONDS):
                self.look(run_dir)

        thread = threading.Thread(target=look_always, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def look(self, run_dir: Path) -> None:
        """Look at the files of the run."""
        path, now = run_dir / "metrics.jsonl", time.monotonic()
        size = path.stat().st_size if path.exists() else -1
        if size == self._size:
            return
        self._size = size
        starts = events(run_dir, "start")
        self.starts, self.began_at = len(starts), int(starts[-1]["step"]) if starts else 0
        steps = {int(line["step"]) for line in metrics(run_dir)}
        self.seen |= {step: (now, self.starts) for step in steps - self._steps}
        self._steps, self.step, self.moved = steps, max(steps, default=0), now
        self.trail.append((now, self.step))

    def is_moving(self) -> bool:
        """Whether its newest start has made steps, and made one just now."""
        return self.step - self.began_at >= NEW_STEPS and time.monotonic() - self.moved < MOVING_SECONDS

    def useful(self) -> float:
        """Seconds of the steps that count: between two lines of one start, without what a save between them took.

        The first step of each start, and the one after a save at most, takes as long as the others.
        """
        spans, pace = self.spans(), self.pace()
        counted = [min(seconds, pace) if step % SAVED_EVERY_STEPS == 1 else seconds for step, seconds in spans]
        return sum(counted) + (len(self.seen) - len(spans)) * pace

    def pace(self) -> float:
        """Seconds of a step that nothing disturbs."""
        return median(seconds for _, seconds in self.spans())

    def spans(self) -> list[tuple[int, float]]:
        """Steps, and seconds between their line and the one before it of the same start."""
        pairs = pairwise((step, *self.seen[step]) for step in sorted(self.seen))
        return [(step, moment - before) for (_, before, start), (step, moment, own) in pairs if own == start]


@dataclass(frozen=True)
class Goodput:
    """Shares of the time, and the time held in seconds: by the run's own files, and by an onlooker's clock.

    at_pace: the onlooker's share with each step at the usual pace, so that a pause inside of a step is lost too.
    """

    share: float
    held: float
    seen_share: float
    seen_held: float
    at_pace: float


def compare_goodput(site: Site, onlooker: Onlooker) -> Goodput:
    """Compare the goodput that the run reports with that of an onlooker."""
    own = measure_goodput(read_run(site.run_dir))
    assert own is not None, "a run that ended has starts"
    return Goodput(
        own.share(),
        own.held(),
        onlooker.useful() / onlooker.held,
        onlooker.held,
        len(onlooker.seen) * onlooker.pace() / onlooker.held,
    )
