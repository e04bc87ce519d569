"""Layers that depend on the step: what a step sets before its first forward pass.

The setting is a function of only the seed and the step, the same on all ranks, so there is nothing to save, and a resumed
run continues with what an uninterrupted one has.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from amfm.model.hybrid import HybridModel


@runtime_checkable
class Scheduled(Protocol):
    """A module that depends on the step."""

    def set_step(self, step: int, total_steps: int, seed: int) -> None:
        """Prepare for the step that follows `step` steps of `total_steps`. No collectives."""


def set_step(model: HybridModel, step: int, total_steps: int) -> None:
    """Prepare every module of a model that depends on the step, after `step` steps of `total_steps`. No collectives."""
    for module in model.modules():
        if isinstance(module, Scheduled):
            module.set_step(step, total_steps, model.seed)
