"""Hooks that write to the masters after a step: pruning, forgetting, and those of installed packages."""

from __future__ import annotations

from amfm.pretrain.hook import Hook
from amfm.pretrain.hooks.forget import forget_if_due
from amfm.pretrain.hooks.plugins import build_hooks, call_hooks
from amfm.pretrain.pruning.prune import prune, prune_if_due
from amfm.pretrain.run import Run
from amfm.pretrain.step_sums import StepResult


class MasterEdits(Hook):
    """Everything that edits masters, in one order."""

    def __init__(self, run: Run) -> None:
        self.run, self.plugins = run, build_hooks(run.config)

    def after_step(self, result: StepResult) -> None:
        """Edit what is due."""
        prune_if_due(self.run)
        forget_if_due(self.run)
        call_hooks(self.run, self.plugins)

    def after_rollback(self) -> None:
        """Prune again: the older weights may have fewer zeros."""
        if self.run.config.prune is not None:
            prune(self.run, self.run.config.prune)
