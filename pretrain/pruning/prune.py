"""Magnitude pruning while a model trains: more and more groups go to zero, the smallest first (pruning/groups.py).

How many are zero after a step is a function of the step alone: a cubic ramp (Zhu and Gupta 2017, arXiv 1710.01878, section
3) from `start_step` to `end_step`. Which ones is asked of the masters, whose zeros are the only memory there is: a group that
is zero has the smallest norm, and stays chosen. So nothing more is saved, and a resumed run goes on as one that was never cut.
"""

from __future__ import annotations

import torch

from amfm.pretrain.checkpoint.masters import MasterView
from amfm.pretrain.checkpoint.save import ranks_of
from amfm.pretrain.config.pruning import PruneConfig
from amfm.pretrain.pruning.groups import GroupPlan, plan_groups
from amfm.pretrain.run import Run


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


def number_pruned(section: PruneConfig, step: int, count: int) -> int:
    """How many of a block's `count` groups are zero after a step: as many as the newest pruning up to it left so."""
    past = range(min(step, section.end_step), section.start_step - 1, -1)
    newest = next((each for each in past if prunes_after(section, each)), 0)
    return round(pruned_share(section, newest) * count)


def prune_if_due(run: Run) -> None:
    """Prune after the step that was just done, if that is one of `prune`. Every rank must call this."""
    section = run.config.prune
    if section is not None and prunes_after(section, run.progress.step):
        prune(run, section)


def prune(run: Run, section: PruneConfig) -> None:
    """Set as many groups of each block to zero as the ramp says now. Every rank must call this."""
    plan = plan_groups(run.config.model, section.groups)
    share = pruned_share(section, run.progress.step)
    ranks = ranks_of(run.engine)
    view = MasterView(run.saver.layout, run.saver.writers, ranks.rank)
    squares = view.sum_groups(plan.groupings, plan.num_groups)
    # Chosen once for all ranks: a reduction need not give all of them the same bits.
    chosen = torch.tensor(ranks.broadcast(choose_groups(plan, squares, share).tolist()), dtype=torch.bool)
    if not chosen.any():
        return
    view.zero_groups(plan.groupings, chosen)
    if section.groups == "experts":
        dead = {unit.place: chosen[unit.first : unit.first + unit.count] for unit in plan.units}
        for index, block in run.model.all_blocks():
            if f"blocks.{index}.mixer." in dead:
                block.mixer.retire_experts(dead[f"blocks.{index}.mixer."])
    run.note_edit()
    number = int(chosen.sum())
    run.record_event("pruned", groups=section.groups, zero=number, of=plan.num_groups)
    run.say(f"step {run.progress.step}: {number:,} of {plan.num_groups:,} {section.groups} are zero")


def choose_groups(plan: GroupPlan, squares: torch.Tensor, share: float) -> torch.Tensor:
    """Choose the groups of least norm, the same share in each unit: [num_groups] bool."""
    chosen = torch.zeros(plan.num_groups, dtype=torch.bool)
    for unit in plan.units:
        number = round(share * unit.count)
        order = squares[unit.first : unit.first + unit.count].argsort(stable=True)
        chosen[unit.first + order[:number]] = True
    return chosen
