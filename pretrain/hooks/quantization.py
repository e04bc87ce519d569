"""Now and then, what the recipes of low precision do to the operands of their products (monitor/quantization.py).

Weights quantised once per step (kernels/low_precision/kept_weights.py): between its first pass and its update they stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import torch

from amfm.kernels.low_precision.kept_weights import keep_weights
from amfm.kernels.low_precision.recipe import recipe_of, watch_operands
from amfm.pretrain.hook import Hook
from amfm.pretrain.micro_batch import LossShare, MicroBatch
from amfm.pretrain.monitor.quantization import Losses, describe_losses
from amfm.pretrain.run import Run
from amfm.pretrain.stages import is_due
from amfm.pretrain.step_sums import StepResult


def build_kept_weights(run: Run) -> list[Hook]:
    """The hook, where `low_precision.quantize_weights` asks for it."""
    return [KeptWeights()] if run.config.low_precision.quantize_weights == "each_step" else []


class KeptWeights(Hook):
    """Opens the block in which codes are kept before the passes, and ends it before anything changes a weight."""

    def __init__(self) -> None:
        self.block = ExitStack()

    def before_passes(self, micro_batches: Sequence[MicroBatch], share: LossShare) -> None:
        """Begin; a step whose passes are taken again starts over."""
        self.block.close()
        self.block.enter_context(keep_weights())

    def before_update(self) -> None:
        """Drop the codes."""
        self.block.close()

    def after_step(self, result: StepResult) -> None:
        """Drop them if there was no update."""
        self.block.close()

    def close(self) -> None:
        """Drop them where a step failed."""
        self.block.close()


def build_quantization(run: Run) -> list[Hook]:
    """The hook, where the run has a recipe."""
    return [] if run.config.low_precision.recipe == "none" else [Quantization(run)]


class Quantization(Hook):
    """Measures a whole step now and then, all kinds of block and all ranks together, into its line of metrics.jsonl."""

    def __init__(self, run: Run) -> None:
        self.run, self.every_steps = run, run.config.low_precision.measure_every_steps
        section, letters = run.config.low_precision, run.config.model.letters
        self.order = sorted(
            describe(symbol, name) for symbol in section.chosen(letters) for name in section.recipes_of(symbol)
        )
        self.losses: Losses | None = None
        self.watching = ExitStack()

    def before_passes(self, micro_batches: Sequence[MicroBatch], share: LossShare) -> None:
        """Begin to listen in a step that is due."""
        if is_due(self.run.progress.step + 1, self.every_steps):
            self.losses = Losses(self._names())
            self.watching.enter_context(watch_operands(self.losses.note))

    def before_update(self) -> None:
        """Stop listening."""
        self.watching.close()

    def after_step(self, result: StepResult) -> None:
        """Add up what all ranks saw."""
        self.watching.close()
        losses, self.losses = self.losses, None
        if losses is None:
            return
        sums = losses.stacked(self.order, self.run.parallel.device)
        if self.run.parallel.world_size > 1:
            torch.distributed.all_reduce(sums)
        result.found["low_precision"] = describe_losses(sums, self.order)

    def close(self) -> None:
        """Stop listening where a step failed."""
        self.watching.close()

    def _names(self) -> dict[int, str]:
        """What the weights here that have a recipe are called, by its seed."""
        names = {}
        for _, block in self.run.model.all_blocks():
            for name, weight in block.mixer.named_parameters():
                recipe = recipe_of(weight)
                if recipe is not None:
                    names[recipe.seed] = describe(block.letter, name)
        return names


def describe(symbol: str, name: str) -> str:
    """A weight of a kind of block, as metrics name it: `M out_proj`."""
    return f"{symbol} {name.removesuffix('.weight')}"
