"""What becomes of numbers that are lost: the first block whose output was not finite, and a loss that stays above chance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from amfm.model.block import Block
from amfm.model.mixers.interface import MixerOutput
from amfm.pretrain.hook import Hook
from amfm.pretrain.micro_batch import LossShare, MicroBatch
from amfm.pretrain.run import Run
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
