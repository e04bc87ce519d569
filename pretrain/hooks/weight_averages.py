"""Averages of weights: a moving one (section `ema`), kept on each rank for the master weights that it steps, and of checkpoints.

The mean of the last checkpoints is validated next to the run (`evaluate.merge_last`).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from amfm.model.hybrid import HybridModel
from amfm.model.on_demand import OnDemand, on_demand
from amfm.pretrain.checkpoint.manifest_file import list_checkpoints, step_of
from amfm.pretrain.config.hook_sections import EmaConfig
from amfm.pretrain.export.average import average
from amfm.pretrain.hook import Hook
from amfm.pretrain.hooks.validate import Validations, validate
from amfm.pretrain.inference.own_part import take_own_part
from amfm.pretrain.inference.weights import Weights, read_weights
from amfm.pretrain.monitor.metrics import finite
from amfm.pretrain.ranks.group import RankGroup
from amfm.pretrain.run import Run
from amfm.pretrain.saving import finish_saving
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
        for number, averaged in self.layout.averages.items():
            weights = self.layout.parts[number].master.detach().reshape(-1).float()
            if step <= options.start:
                averaged.copy_(weights)
            else:
                averaged.lerp_(weights, 1 - options.decay)


class MergedValidation(Hook):
    """Validates the mean of the newest checkpoints on the rows of the run's own validation, whenever that is due.

    The loss is one of the step's validation sets, `merge_last_N`, once there are N checkpoints. Each rank reads and verifies
    a checkpoint once, takes its part of the mean into the model that it holds, and puts back its weights, which it kept on
    the host: the run does not change.
    """

    def __init__(self, run: Run, validations: Validations, last: int) -> None:
        self.run, self.validations, self.last = run, validations, last
        self.read: dict[int, Weights] = {}

    def after_step(self, result: StepResult) -> None:
        """Measure where the run was just validated."""
        loader, ranks = self.validations.loader, RankGroup(self.run.parallel.rank, self.run.parallel.world_size)
        if loader is None or "validation_loss" not in result.found:
            return
        run, began, name = self.run, time.perf_counter(), f"merge_last_{self.last}"
        finish_saving(run)  # so that which ones are the newest is a matter of steps, and none is deleted meanwhile
        newest = ranks.broadcast(list_checkpoints(Path(run.config.run.dir) / "checkpoints")[: self.last])
        if len(newest) < self.last:
            return
        run.clock("validate")
        self.read = {
            step: self.read.get(step) or read_weights(path) for path in reversed(newest) for step in [step_of(path)]
        }
        merged = average(list(self.read.values()), (1 / self.last,) * self.last)
        run.engine.wait_for_weights()
        with holding(run.model, on_demand(merged.state)):
            found = validate(run, loader)
        result.found.setdefault("validation_sets", {})[name] = finite(found.loss)
        result.found["validation_seconds"] += time.perf_counter() - began
        run.record_event("validation", set=name, loss=finite(found.loss), tokens=found.tokens, steps=list(self.read))


@contextmanager
def holding(model: HybridModel, state: OnDemand) -> Iterator[None]:
    """Inside the block a rank's model holds its part of these weights; afterwards its own again, bitwise."""
    with torch.no_grad():
        own = {name: tensor.detach().to("cpu", copy=True) for name, tensor in model.state_dict().items()}
        try:
            take_own_part(model, state)
            yield
        finally:
            for name, tensor in model.state_dict().items():
                tensor.copy_(own[name])
