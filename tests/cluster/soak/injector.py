"""What an onlooker knows of a run, without what the run says of itself: when each step's line came, and when Slurm held nodes."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median

from amfm.pretrain.report.data import read_run
from amfm.pretrain.report.goodput import measure_goodput
from tests.cluster.cluster import events, metrics
from tests.cluster.soak.site import Site


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

    def look(self, site: Site, now: float) -> None:
        """Look at the files of the run."""
        path = site.run_dir / "metrics.jsonl"
        size = path.stat().st_size if path.exists() else -1
        if size == self._size:
            return
        self._size = size
        starts = events(site.run_dir, "start")
        self.starts, self.began_at = len(starts), int(starts[-1]["step"]) if starts else 0
        steps = {int(line["step"]) for line in metrics(site.run_dir)}
        self.seen |= {step: (now, self.starts) for step in steps - self._steps}
        self._steps, self.step, self.moved = steps, max(steps, default=0), now
        self.trail.append((now, self.step))

    def new_steps(self) -> int:
        """Steps of the newest start."""
        return self.step - self.began_at

    def useful(self, saved: set[int]) -> float:
        """Seconds of the steps that count: between two lines of one start; those after a save or a start as the others."""
        spans = {
            step: moment - before
            for (last, (before, start)), (step, (moment, own)) in pairwise(sorted(self.seen.items()))
            if own == start and last not in saved
        }
        usual = median(spans.values())
        return sum(spans.get(step, usual) for step in self.seen)

    def pace(self) -> float:
        """Seconds of a step that nothing disturbs."""
        return median(
            moment - before for (before, _), (moment, _) in pairwise(self.seen[step] for step in sorted(self.seen))
        )


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
    saved = {int(event["step"]) for event in events(site.run_dir, "checkpoint")}
    return Goodput(
        own.share(),
        own.held(),
        onlooker.useful(saved) / onlooker.held,
        onlooker.held,
        len(onlooker.seen) * onlooker.pace() / onlooker.held,
    )
