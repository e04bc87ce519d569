"""Ends a start in order after some minutes (`train.stop_after_minutes`), as a signal would."""

from __future__ import annotations

import signal
import time

from amfm.pretrain.hook import Hook
from amfm.pretrain.run import Run
from amfm.pretrain.step_sums import StepResult


class TimeLimit(Hook):
    """Gives the main rank a signal once the time is over: with the next step, all ranks agree, save and end."""

    def __init__(self, run: Run, minutes: float) -> None:
        self.run, self.minutes = run, minutes
        self.ends = time.monotonic() + 60 * minutes

    def after_step(self, result: StepResult) -> None:
        """Note that the time is over, once, on the main rank."""
        run = self.run
        if run.parallel.is_main and not run.signals.received and time.monotonic() >= self.ends:
            run.tell(
                "time_limit", f"train.stop_after_minutes={self.minutes:g} are over: the next step is this start's last"
            )
            run.signals.received = signal.SIGTERM
