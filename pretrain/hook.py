"""A hook: something that a run does besides training, at a few moments.

Hooks know the run; the step and the loop know no hook. Every rank builds the same ones and calls them in the same order
(hooks/build.py), so a hook may use collectives. What it keeps is a function of the step and the master weights: a checkpoint
has no place for it. What it finds after a step goes into `result.found`, and so into the step's line of metrics.jsonl.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from amfm.pretrain.micro_batch import LossShare, MicroBatch
from amfm.pretrain.step_sums import StepResult


class Hook:
    """Does nothing; a subclass overrides the moments that it needs. Every rank calls each but `at_start` and `after_log`."""

    def at_start(self) -> None:
        """When the log is open, before the first step: only the main rank calls it."""

    def before_passes(self, micro_batches: Sequence[MicroBatch], share: LossShare) -> None:
        """Before the first forward pass of a step, inside `engine.accumulate`."""

    def before_update(self) -> None:
        """After the gradients are reduced, before the optimizer's step."""

    def after_step(self, result: StepResult) -> None:
        """After a step, before it may end the run."""

    def after_log(self, metrics: Mapping[str, Any]) -> None:
        """After the step's line is in metrics.jsonl: only the main rank calls it, with what the line holds."""

    def after_edit(self) -> None:
        """After master weights or weights were written to between steps."""

    def after_rollback(self) -> None:
        """After the weights of an older checkpoint were restored."""

    def before_save(self) -> None:
        """Before a checkpoint or a replica is taken."""

    def between_saves(self) -> None:
        """After a step that is not saved, while nothing is being written on any rank, unless it is the last."""

    def at_end(self) -> None:
        """When the run ended in order and everything is saved."""

    def close(self) -> None:
        """On the way out, whether or not the run ended in order."""


HookMaker = Callable[[Any], Hook]  # from a run
