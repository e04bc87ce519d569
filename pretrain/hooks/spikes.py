"""Reports steps whose loss or gradient norm is far above the recent ones, in standard deviations (`health.spike_sigma`).

The rule of OLMo-core's skip-step optimizer, and in form that of OLMo 2's spike score (arXiv 2501.00656). Every run reports them.
With `health.spike_rule=sigma` they are also what `health.on_spike` acts on, by windows that checkpoints keep (monitor/anomalies.py).
"""

from __future__ import annotations

from collections import deque

from amfm.pretrain.hook import Hook
from amfm.pretrain.monitor.anomalies import deviations, judge_deviation
from amfm.pretrain.run import Run
from amfm.pretrain.stages import first_sample
from amfm.pretrain.step_sums import StepResult


class Spikes(Hook):
    """Keeps a window of steps in memory, which a start fills again; steps that spike are left out of it."""

    def __init__(self, run: Run, sigma: float) -> None:
        self.run, self.sigma = run, sigma
        self.window: dict[str, deque[float]] = {
            name: deque(maxlen=run.config.health.spike_window) for name in ("loss", "grad_norm")
        }
        self.stage = run.stage

    def before_update(self) -> None:
        """Reject the update where the gradient norm is what `health.on_spike` acts on; a loss was judged before it was reduced."""
        run, health = self.run, self.run.config.health
        norms = run.progress.recent_norms
        if health.spike_rule == "ratio" or health.on_spike == "ignore" or len(norms) < health.spike_window:
            return
        anomaly = judge_deviation("gradient norm", run.engine.reduced_norm(), norms, health)
        if anomaly is not None:
            run.engine.refuse_update(anomaly.text)

    def after_step(self, result: StepResult) -> None:
        """Judge the step against the window, and take it in."""
        run, values = self.run, {"loss": result.loss, "grad_norm": result.grad_norm}
        if run.stage is not self.stage:  # other text or longer rows have another loss
            self.stage = run.stage
            self.after_rollback()
        high = {
            name: z
            for name, value in values.items()
            if len(self.window[name]) == self.window[name].maxlen
            and (z := deviations(value, self.window[name])) is not None
            and z > self.sigma
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

    def after_rollback(self) -> None:
        """Other weights have other losses."""
        for window in self.window.values():
            window.clear()
