"""Reports steps whose loss or gradient norm is far above the recent ones, in standard deviations (`health.spike_sigma`).

The rule of OLMo-core's skip-step optimizer, and in form that of OLMo 2's spike score (arXiv 2501.00656). It only reports: `health.on_spike`
says what is done about a loss that jumps by its own rule.
"""

from __future__ import annotations

import statistics
from collections import deque

from amfm.pretrain.hook import Hook
from amfm.pretrain.run import Run
from amfm.pretrain.stages import first_sample
from amfm.pretrain.step_sums import StepResult

LEAST_SIGMA = 1e-6  # of the mean: a curve without noise has no spikes of rounding


class Spikes(Hook):
    """Keeps a window of steps in memory, which a start fills again; steps that spike are left out of it."""

    def __init__(self, run: Run, sigma: float) -> None:
        self.run, self.sigma = run, sigma
        self.window: dict[str, deque[float]] = {
            name: deque(maxlen=run.config.health.spike_window) for name in ("loss", "grad_norm")
        }
        self.stage = run.stage

    def after_step(self, result: StepResult) -> None:
        """Judge the step against the window, and take it in."""
        run, values = self.run, {"loss": result.loss, "grad_norm": result.grad_norm}
        if run.stage is not self.stage:  # other text or longer rows have another loss
            self.stage = run.stage
            self.after_rollback()
        high = {
            name: z for name, value in values.items() if (z := self.score(name, value)) is not None and z > self.sigma
        }
        if not high:
            for name, value in values.items():
                if abs(value) < float("inf"):
                    self.window[name].append(value)
            return
        step = run.progress.step
        samples = [first_sample(run.stages, step), first_sample(run.stages, step + 1)]
        result.found["spike"] = high
        words = " and ".join(f"{name.replace('_', ' ')} {values[name]:.4g} ({z:.1f} sigma)" for name, z in high.items())
        run.tell(
            "spike",
            f"step {step}: {words} above the last {run.config.health.spike_window} steps; its documents: amfm inspect "
            f"{run.directory} --spike {step}",
            sigma=high,
            samples=samples,
        )

    def score(self, name: str, value: float) -> float | None:
        """How many standard deviations a value is above the mean of a full window; None before there is one."""
        window = self.window[name]
        if len(window) < (window.maxlen or 0) or not abs(value) < float("inf"):
            return None
        mean = statistics.fmean(window)
        return (value - mean) / max(statistics.pstdev(window, mean), LEAST_SIGMA * abs(mean), 1e-12)

    def after_rollback(self) -> None:
        """Other weights have other losses."""
        for window in self.window.values():
            window.clear()
