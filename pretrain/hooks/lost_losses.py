"""Losses that are lost: the first block whose output was not finite, a loss that stays above chance, and steps that spike.

A spike is a loss or gradient norm far above the recent ones, in standard deviations (`health.spike_sigma`): the rule of
OLMo-core's skip-step optimizer, and in form that of OLMo 2's spike score (arXiv 2501.00656). Every run reports them. With
`health.spike_rule=sigma` they are also what `health.on_spike` acts on, by windows that checkpoints keep (monitor/anomalies.py).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from amfm.model.block import Block
from amfm.model.mixers.interface import MixerOutput
from amfm.pretrain.hook import Hook
from amfm.pretrain.micro_batch import LossShare, MicroBatch
from amfm.pretrain.monitor.anomalies import deviations, judge_deviation
from amfm.pretrain.run import Run
from amfm.pretrain.stages import first_sample
from amfm.pretrain.step import forward_only
from amfm.pretrain.step_sums import StepResult

STEPS = 20  # in a row
MARGIN = 0.5  # nats above the loss of a uniform guess, where first steps of a slow warm-up are not


class FirstNonfinite(Hook):
    """After a step whose gradients are not finite, computes its forward passes again and names the first bad output.

    Not with a pipeline, where a rank has some blocks, and not where blocks are replayed as CUDA graphs.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.given: Sequence[MicroBatch] = ()
        self.can_look = run.pipeline is None and run.config.train.cuda_graphs != "blocks"

    def before_passes(self, micro_batches: Sequence[MicroBatch], share: LossShare) -> None:
        """Keep what the step reads."""
        self.given = micro_batches

    def after_step(self, result: StepResult) -> None:
        """Name the block in the step's event."""
        given, self.given = self.given, ()
        if result.skip is None or result.anomaly is None or result.anomaly.kind != "nonfinite" or not self.can_look:
            return
        result.skip["first_nonfinite"] = self.find(given)

    def find(self, micro_batches: Sequence[MicroBatch]) -> str:
        """The first place in the order of a forward pass, in any micro-batch of any rank. Every rank must call this."""
        names: dict[str, None] = {}
        flags: list[Tensor] = []

        def note(block: nn.Module, _: Any, output: tuple[Tensor, MixerOutput]) -> None:
            residual_BTD, mixed = output
            assert isinstance(block, Block), "registered on blocks"
            if block.index == 0:
                names.setdefault("the embedding's output")
                flags.append(residual_BTD.isfinite().all())
            names.setdefault(f"the output of {block.describe()}")
            flags.append(mixed.y_BTD.isfinite().all())

        hooks = [block.register_forward_hook(note) for _, block in self.run.model.all_blocks()]
        self.run.model.eval()
        try:
            for _ in forward_only(self.run, micro_batches):
                pass
        finally:
            for hook in hooks:
                hook.remove()
        bad_PM = ~torch.stack(flags).view(len(micro_batches), -1).T
        places = bad_PM.any(1).nonzero().flatten().tolist()
        first = -self.run.parallel.max_over_all([-(places[0] if places else len(names))])[0]
        return [*names, "the head, the loss or the backward pass"][first]


class Divergence(Hook):
    """Warns, once in a start, of a loss that many steps in a row is above that of a uniform guess."""

    def __init__(self, run: Run) -> None:
        self.run, self.in_row = run, 0
        self.chance = math.log(run.config.model.vocab_size)

    def after_step(self, result: StepResult) -> None:
        """Count."""
        self.in_row = self.in_row + 1 if result.loss > self.chance + MARGIN else 0
        if self.in_row == STEPS:
            self.run.tell(
                "diverged",
                f"step {self.run.progress.step}: for {STEPS} steps the loss is above {self.chance:.2f}, that of a uniform guess "
                f"(now {result.loss:.2f}): lower optimizer.learning_rate, or see docs/debugging.md",
                loss=result.loss,
                chance=self.chance,
            )


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
