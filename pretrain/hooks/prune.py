"""Magnitude pruning between steps, as the section `prune` asks for it, and what a model can be pruned by.

Groups of weights that leave together, in every block that has them.

    channels   inner channels of dense feed-forwards and shared experts: a row of up (of gate and up), a column of down
    experts    whole routed experts
    heads      a key-value head with its query heads: rows of q, k, v and the gates, columns of o

A group of zeros has a zero gradient, because every product that leads to one of its weights passes another of them: so
it stays at zero while the rest trains, weight decay included, and nothing has to hold it there. An expert needs one
thing more: the router must not choose it, so its balancing bias is put if no score can reach it.

Magnitude pruning while a model trains: more and more groups go to zero, the smallest first.

How many are zero after a step is a function of only the step: a cubic ramp (Zhu and Gupta 2017, arXiv 1710.01878,
section 3) from `start_step` to `end_step`. Which ones is asked of the master weights, whose zeros are the only memory there
is: a group that is zero has the smallest norm, and stays chosen. So nothing more is saved, and a resumed run continues
as one that was never cut.

Active forgetting: the embedding is re-initialised every N steps, with first values of its own seed.

The rest of the model then learns what does not depend on one table of embeddings, so that another one (of another
language, for example) is learnt faster later (Chen et al. 2023, arXiv 2307.01163). A function of the step: nothing more is
saved.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from amfm.model.config.options import Prunable
from amfm.model.config.schema import ModelConfig
from amfm.model.init import initial_values, named_seed
from amfm.pretrain.checkpoint.engine_layout import Grouping
from amfm.pretrain.checkpoint.save import ranks_of
from amfm.pretrain.config.hook_sections import ForgetConfig, PruneConfig, PrunedGroups
from amfm.pretrain.hook import Hook
from amfm.pretrain.inference.merge import mixer_places
from amfm.pretrain.run import Run
from amfm.pretrain.step_sums import StepResult


@dataclass(frozen=True)
class Unit:
    """The groups of one block that are weighed against each other: `count` of them from number `first`.

    place: what the names of their parameters begin with. letter: of the block. groups: as its options say.
    """

    place: str
    letter: str
    first: int
    groups: Prunable

    @property
    def count(self) -> int:
        """Number of groups."""
        return self.groups.count


@dataclass
class GroupPlan:
    """All groups of a model, numbered, and how each parameter is divided among them."""

    units: list[Unit] = field(default_factory=list)
    groupings: dict[str, Grouping] = field(default_factory=dict)

    @property
    def num_groups(self) -> int:
        """Number of groups of all units."""
        return sum(unit.count for unit in self.units)

    def add(self, mixer: str, symbol: str, groups: Prunable) -> None:
        """Add the groups of a mixer whose parameters begin with `mixer`."""
        first, place = self.num_groups, mixer + groups.place
        self.units.append(Unit(place, symbol, first, groups))
        for name, (dim, period, width) in groups.dims.items():
            self.groupings[place + name] = Grouping(dim, period, width, first)


def plan_groups(config: ModelConfig, kind: PrunedGroups) -> GroupPlan:
    """Number the groups of a kind over all blocks that have them; the configuration must have passed its checks."""
    plan = GroupPlan()
    for place, symbol in mixer_places(config):
        groups = config.block_options(symbol).prunable(kind)
        if groups is not None:
            plan.add(place, symbol, groups)
    return plan


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


EMBEDDING = "embedding.weight"


class Forget(Hook):
    """Gives the embedding new first values and zero moments, as the section `forget` asks for it."""

    def __init__(self, section: ForgetConfig, run: Run) -> None:
        self.run, self.section = run, section

    def after_step(self, result: StepResult) -> None:
        """Forget if the step just done is one for it."""
        run, section, step = self.run, self.section, self.run.progress.step
        if step > section.until_step or step % section.every_steps:
            return
        model = run.config.model
        seed = named_seed(run.config.train.seed, f"forget.{step // section.every_steps}")
        values = initial_values(EMBEDDING, (model.vocab_size, model.hidden_size), model, seed)
        run.open_masters().write({EMBEDDING: values})
        run.note_edit()
        run.tell("forgot", f"step {step}: the embedding is re-initialized", parameter=EMBEDDING)


class Prune(Hook):
    """Sets the smallest groups of each block to zero, more and more of them."""

    def __init__(self, section: PruneConfig, run: Run) -> None:
        self.run, self.section = run, section

    def after_step(self, result: StepResult) -> None:
        """Prune if the step just done is one for it."""
        if prunes_after(self.section, self.run.progress.step):
            self.prune()

    def after_rollback(self) -> None:
        """Prune again: the older weights may have fewer zeros."""
        self.prune()

    def prune(self) -> None:
        """Set as many groups of each block to zero as the ramp says now. Every rank must call this."""
        run, groups = self.run, self.section.groups
        plan = plan_groups(run.config.model, groups)
        share = pruned_share(self.section, run.progress.step)
        view = run.open_masters()
        squares = view.sum_groups(plan.groupings, plan.num_groups)
        # Chosen once for all ranks: a reduction need not give all of them bitwise identical results.
        chosen = ranks_of(run.engine).broadcast(choose_groups(plan, squares, share).tolist())
        chosen_G = torch.tensor(chosen, dtype=torch.bool)
        if not chosen_G.any():
            return
        view.zero_groups(plan.groupings, chosen_G)
        if groups == "experts":
            dead = {unit.place: chosen_G[unit.first : unit.first + unit.count] for unit in plan.units}
            for index, block in run.model.all_blocks():
                if f"blocks.{index}.mixer." in dead:
                    block.mixer.retire_experts(dead[f"blocks.{index}.mixer."])
        run.note_edit()
        number = int(chosen_G.sum())
        text = f"step {run.progress.step}: {number:,} of {plan.num_groups:,} {groups} are zero"
        run.tell("pruned", text, groups=groups, zero=number, of=plan.num_groups)
