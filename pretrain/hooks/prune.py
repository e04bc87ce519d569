"""Magnitude pruning between steps, as the section `prune` asks for it; pruning/ says how many, and groups of what.

Active forgetting: the embedding is re-initialised every N steps, with first values of its own seed.

The rest of the model then learns what does not depend on one table of embeddings, so that another one (of another
language, for example) is learnt faster later (Chen et al. 2023, arXiv 2307.01163). A function of the step: nothing more is
saved.
"""

from __future__ import annotations

import torch

from amfm.model.init import initial_values, named_seed
from amfm.pretrain.checkpoint.save import ranks_of
from amfm.pretrain.config.hook_sections import ForgetConfig, PruneConfig
from amfm.pretrain.hook import Hook
from amfm.pretrain.pruning.groups import choose_groups, plan_groups, pruned_share, prunes_after
from amfm.pretrain.run import Run
from amfm.pretrain.step_sums import StepResult

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
