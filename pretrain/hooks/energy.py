"""Energy of all GPUs, every ENERGY_STEPS steps, where the driver counts it (monitor/energy.py)."""

from __future__ import annotations

import time

import torch

from amfm.pretrain.hook import Hook
from amfm.pretrain.monitor.energy import EnergyMeter
from amfm.pretrain.monitor.metrics import finite
from amfm.pretrain.run import Run
from amfm.pretrain.stages import is_due
from amfm.pretrain.step_sums import StepResult

ENERGY_STEPS = 20


class Energy(Hook):
    """Puts `energy` into a step's line: joules of all GPUs since the reading before, and watts of one in the mean.

    meter: of this rank; None: the driver's. Where one rank has none, no rank reads, and the start says why.
    """

    def __init__(self, run: Run, meter: EnergyMeter | None = None) -> None:
        self.run, self.problem = run, ""
        try:
            self.meter = meter or EnergyMeter.of(run.parallel.device)
        except RuntimeError as error:
            self.problem = str(error)
        (is_missing,) = run.parallel.max_over_all([int(bool(self.problem))])
        self.is_read = not is_missing
        self.since = time.monotonic()

    def at_start(self) -> None:
        """Say that energy is not logged."""
        if not self.is_read:
            self.run.say(f"energy of GPUs is not logged: {self.problem or 'another rank has no reading'}")

    def after_step(self, result: StepResult) -> None:
        """Read, and add up what all ranks have used."""
        if not self.is_read or not is_due(self.run.progress.step, ENERGY_STEPS):
            return
        try:
            own = self.meter.take()
        except RuntimeError:  # all ranks learn of it: the sum has no number
            own = float("nan")
        joules = torch.tensor([own], dtype=torch.float64, device=self.run.parallel.device)
        if self.run.parallel.world_size > 1:
            torch.distributed.all_reduce(joules)
        now = time.monotonic()
        total, seconds, self.since = float(joules), now - self.since, now
        watts = total / seconds / self.run.parallel.world_size
        result.found["energy"] = {"joules": finite(total), "watts_per_gpu": finite(watts)}
