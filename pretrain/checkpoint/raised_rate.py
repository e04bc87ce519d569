"""Reports when a resume would raise the learning rate again: a longer run spreads its schedule over more steps.

Who extends a finished run wants to keep what it learned in its decay. Under more steps the decay begins later, so the next
step would have a rate that the run had left behind. From the checkpoint before the decay it continues as a run of so
many steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from amfm.pretrain.checkpoint.names import step_of
from amfm.pretrain.config.schema import RunConfig
from amfm.pretrain.stages import last_stage, resolve_stages

TOLERANCE = 1e-6  # relative; nearer rates are the same number, computed another way


def describe_raised_rate(saved: RunConfig, current: RunConfig, step: int, checkpoints: Sequence[Path]) -> str | None:
    """Report that the step after `step`, which is done, has a higher rate than it by a changed schedule, and where to
    go back to.

    None where the schedule gives step `step` the rate that it had, or a lower one. checkpoints: of the run, newest first.
    """
    if step == 0:
        return None
    before, now = (last_stage(resolve_stages(config), step) for config in (saved, current))
    next_step = min(step + 1, now.last_step)
    if min(now.rate(step), now.rate(next_step)) <= before.rate(step) * (1 + TOLERANCE):
        return None
    said = (
        f"over {now.num_steps:,} steps the schedule raises the learning rate again: step {next_step:,} runs at "
        f"{now.rate(next_step):.1e}, step {step:,} ran at {before.rate(step):.1e}"
    )
    for path in checkpoints:
        older = step_of(path)
        if before.first_step < older < step and math.isclose(now.rate(older), before.rate(older), rel_tol=TOLERANCE):
            return (
                f"{said}. To continue from where the old schedule and the new one agree, at step {older:,}: stop this, and amfm rollback "
                f"{path.parent.parent} --to {older}. To keep the rate low, append a stage with its own learning_rate"
            )
    return f"{said}, and no older checkpoint has the same rate under both. To keep it low, append a stage with its own learning_rate"
