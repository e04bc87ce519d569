"""Cosine cycles with warm restarts as a schedule of amfm (Loshchilov and Hutter 2017, arXiv 1608.03983, equation 5)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from pydantic import Field

from amfm.model.config.section import Section
from amfm.pretrain.config.optimizers import ScheduleSpec

if TYPE_CHECKING:  # the schema asks for this file while it is being built
    from amfm.pretrain.config.schema import ScheduleConfig


class Options(Section):
    """Cosine cycles of equal length, each from the peak to the floor."""

    cycles: int = Field(4, gt=0, description="Cycles after the warm-up.")


def factor(step: int, total_steps: int, schedule: ScheduleConfig, options: Options) -> float:
    """Share of the peak rate: 1 just after a restart, `min_ratio` at the last step."""
    warmup_steps = schedule.warmup_length(total_steps)
    position = (step - warmup_steps) / (total_steps - warmup_steps) * options.cycles
    inside = 1.0 if step == total_steps else position % 1
    return schedule.min_ratio + (1 - schedule.min_ratio) * 0.5 * (1 + math.cos(math.pi * inside))


SPEC = ScheduleSpec("sgdr", "amfm_sgdr:factor", Options)
