"""The look for silent corruption, as `health.check_state_every_steps` asks for it (monitor/corruption.py)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from amfm.kernels.common.gradient_sum import gradients_by_autograd
from amfm.pretrain.hook import Hook
from amfm.pretrain.micro_batch import LossShare, MicroBatch
from amfm.pretrain.monitor.corruption import StateWatch
from amfm.pretrain.run import Run
from amfm.pretrain.step import forward_micro_batch, forward_only
from amfm.pretrain.step_sums import StepResult


class StateWatchHook(Hook):
    """Compares the state at rest, its copies, and a micro-batch that is run twice."""

    def __init__(self, run: Run, every_steps: int) -> None:
        self.run, self.every_steps = run, every_steps
        self.watch = StateWatch(run.saver.layout, run.parallel)

    def before_passes(self, micro_batches: Sequence[MicroBatch], share: LossShare) -> None:
        """Run the first micro-batch twice."""
        step = self.run.progress.step + 1
        if step % self.every_steps == 0:
            self.watch.examine_recomputed(lambda: run_apart(self.run, micro_batches, share), step)

    def before_update(self) -> None:
        """Compare what has rested since the last examination."""
        self.watch.examine_rest(self.run.progress.step + 1)

    def after_step(self, result: StepResult) -> None:
        """Examine the state when it is due."""
        if self.run.progress.step % self.every_steps == 0:
            self.watch.examine(self.run.progress.step)

    def after_edit(self) -> None:
        """What was edited is not a silent corruption."""
        self.watch.allow_change()

    def before_save(self) -> None:
        """Examine the state, so that nothing damaged is saved."""
        self.watch.examine(self.run.progress.step)


def run_apart(run: Run, micro_batches: Sequence[MicroBatch], share: LossShare) -> dict[str, Tensor]:
    """Run the first micro-batch without a trace in the engine, and return its sums and gradients by name.

    With a pipeline or ZeRO 3, which own the backward pass, it is only the forward pass; a pipeline runs all of them.
    """
    if run.pipeline is not None or run.engine.zero_stage == 3:
        run.engine.module.eval()  # or ZeRO 3 takes it for the order of a step
        outputs = list(forward_only(run, micro_batches if run.pipeline is not None else micro_batches[:1]))
        run.engine.module.train()
        gradients = {}
    else:
        named = {name: weight for name, weight in run.engine.module.named_parameters() if weight.requires_grad}
        with gradients_by_autograd():
            output = forward_micro_batch(run, micro_batches[0])
            loss = share.apply(output)
            assert loss is not None, "a batch has labels"
            found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        outputs, gradients = (
            [output],
            {f"gradient of {name}": value for name, value in zip(named, found) if value is not None},
        )
    losses = {f"loss {index}": output.loss.nll_sum for index, output in enumerate(outputs) if output.loss is not None}
    return losses | gradients
