"""A moving average of the weights (section `ema`), kept on each rank for the master weights that it steps."""

from __future__ import annotations

import torch

from amfm.pretrain.config.hook_sections import EmaConfig
from amfm.pretrain.hook import Hook
from amfm.pretrain.run import Run
from amfm.pretrain.stages import is_due
from amfm.pretrain.step_sums import StepResult


class Ema(Hook):
    """average = decay * average + (1 - decay) * weight, after every `every_steps` steps; until `start`, the weight itself.

    Averages are where the master weights are and are cut as they are, whatever layout and ZeRO stage; checkpoints hold them like
    moments (`EngineLayout.averages`). One that a checkpoint lacks begins as the weights.
    """

    def __init__(self, options: EmaConfig, run: Run) -> None:
        self.options, self.run, self.layout = options, run, run.saver.layout
        for number, part in enumerate(self.layout.parts):
            self.layout.averages[number] = part.master.detach().reshape(-1).float().clone()

    @torch.no_grad()
    def after_step(self, result: StepResult) -> None:
        """Take the step's weights in, where that is due."""
        step, options = self.run.progress.step, self.options
        if step > options.start and not is_due(step, options.every_steps):
            return
        for number, average in self.layout.averages.items():
            weights = self.layout.parts[number].master.detach().reshape(-1).float()
            if step <= options.start:
                average.copy_(weights)
            else:
                average.lerp_(weights, 1 - options.decay)
