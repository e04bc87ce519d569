"""The hooks of a run, in the order in which they are called."""

from __future__ import annotations

from amfm.pretrain.hook import Hook
from amfm.pretrain.hooks.edits import MasterEdits
from amfm.pretrain.hooks.metrics import Metrics
from amfm.pretrain.hooks.state_watch import build_state_watch
from amfm.pretrain.hooks.tasks import Tasks
from amfm.pretrain.hooks.validate import Validations
from amfm.pretrain.run import Run


def build_hooks(run: Run) -> tuple[Hook, ...]:
    """Edits come first, so that all others see the weights of the next step; the log comes last, with what they found."""
    watch = build_state_watch(run)
    return (MasterEdits(run), *watch, Validations(run), Tasks(run), Metrics(run))
