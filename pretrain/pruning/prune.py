"""Magnitude pruning while a model trains: more and more groups go to zero, the smallest first (hooks/prune.py does it).

How many are zero after a step is a function of the step alone: a cubic ramp (Zhu and Gupta 2017, arXiv 1710.01878,
section 3) from `start_step` to `end_step`. Which ones is asked of the masters, whose zeros are the only memory there
is: a group that is zero has the smallest norm, and stays chosen. So nothing more is saved, and a resumed run continues
as one that was never cut.
"""

from __future__ import annotations

import torch

from amfm.pretrain.config.pruning import PruneConfig
from amfm.pretrain.pruning.groups import GroupPlan


def pruned_share(section: PruneConfig, step: int) -> float:
    """Share of the groups that are zero after a step."""
    if step < section.start_step:
        return 0.0
    done = min(1.0, (step - section.start_step) / (section.end_step - section.start_step))
    return (1 - section.keep) * (1 - (1 - done) ** 3)


def prunes_after(section: PruneConfig, step: int) -> bool:
    """Whether groups go to zero after a step."""
    inside = section.start_step <= step <= section.end_step
    return inside and ((step - section.start_step) % section.every_steps == 0 or step == section.end_step)


def choose_groups(plan: GroupPlan, squares: torch.Tensor, share: float) -> torch.Tensor:
    """Choose the groups of least norm, the same share in each unit: [num_groups] bool."""
    chosen = torch.zeros(plan.num_groups, dtype=torch.bool)
    for unit in plan.units:
        number = round(share * unit.count)
        order = squares[unit.first : unit.first + unit.count].argsort(stable=True)
        chosen[unit.first + order[:number]] = True
    return chosen
