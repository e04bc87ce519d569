"""Now and then, the ranks that compute much longer than the others (monitor/stragglers.py)."""

from __future__ import annotations

from dataclasses import asdict

from amfm.pretrain.hook import Hook
from amfm.pretrain.monitor.stragglers import STRAGGLER_STEPS, StepTimes
from amfm.pretrain.run import Run
from amfm.pretrain.stages import is_due
from amfm.pretrain.step_sums import StepResult


class Stragglers(Hook):
    """Compares the ranks' own work of the last steps."""

    def __init__(self, run: Run) -> None:
        self.run, self.times = run, StepTimes()

    def after_step(self, result: StepResult) -> None:
        """Record the step's busy seconds, and compare ranks when that is due."""
        self.times.add(result.busy_seconds)
        if not is_due(self.run.progress.step, STRAGGLER_STEPS):
            return
        slow = self.times.find(self.run.parallel, self.run.config.health.straggler_percent)
        if slow:
            names = ", ".join(str(entry) for entry in slow)
            text = f"step {self.run.progress.step}: slower than the median: {names}"
            self.run.tell("stragglers", text, ranks=[asdict(entry) for entry in slow])
