"""Weights quantised once per step (kernels/low_precision/kept_weights.py): between its first pass and its update they stay as they are."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

from amfm.kernels.low_precision.kept_weights import keep_weights
from amfm.pretrain.hook import Hook
from amfm.pretrain.micro_batch import LossShare, MicroBatch
from amfm.pretrain.run import Run
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
        """Drop them where there was no update."""
        self.block.close()

    def close(self) -> None:
        """Drop them where a step failed."""
        self.block.close()
