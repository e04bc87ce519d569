"""The proximal steps of a k-level envelope on group norms; see the README for the formulas."""

from __future__ import annotations

import torch
from torch import Tensor

from amfm.pretrain.checkpoint.masters import MasterView
from amfm.pretrain.hook import Hook
from amfm.pretrain.pruning.groups import plan_groups
from amfm.pretrain.pruning.prune import choose_groups
from amfm.pretrain.run import Run
from amfm.pretrain.step_sums import StepResult
from amfm_envelope.spec import EnvelopeOptions

HALVINGS = 80  # of an interval of float64 numbers


class EnvelopeHook(Hook):
    """Shrinks groups towards the largest of each block while the penalty rises, then sets the others to zero."""

    def __init__(self, options: EnvelopeOptions, run: Run) -> None:
        self.options, self.run = options, run
        self.plan = plan_groups(run.config.model, options.groups)

    def after_step(self, result: StepResult) -> None:
        """Shrink, or choose, if the step is one for it; nothing before and after."""
        options, step = self.options, self.run.progress.step
        is_due = (step - options.start_step) % options.every_steps == 0 or step == options.end_step
        if not options.start_step <= step <= options.end_step or not is_due:
            return
        edited = self.edit(self.run.open_masters(), step)
        self.run.note_edit()
        words = ", ".join(f"{key} {value}" for key, value in edited.items())
        self.run.tell("hook", f"step {step}: envelope: {words}", name="envelope", **edited)

    def edit(self, view: MasterView, step: int) -> dict[str, int]:
        """Shrink the groups, or leave the largest alone at the last step; returns what was done to how many."""
        options = self.options
        squares = view.sum_groups(self.plan.groupings, self.plan.num_groups)
        if step == options.end_step:
            chosen = choose_groups(self.plan, squares, 1 - options.keep)
            view.zero_groups(self.plan.groupings, chosen)
            return {"zero": int(chosen.sum()), "of": self.plan.num_groups}
        done = (step - options.start_step + 1) / (options.end_step - options.start_step)
        factors = torch.ones_like(squares)
        for unit in self.plan.units:
            own = slice(unit.first, unit.first + unit.count)
            norms = squares[own].sqrt()
            factors[own] = shrink_factors(norms, round(options.keep * unit.count), done * options.strength)
        view.scale_groups(self.plan.groupings, factors)
        return {"shrunk": int((factors < 1).sum()), "of": self.plan.num_groups}


def envelope_shares(norms: Tensor, kept: int, strength: float) -> Tensor:
    """u [n] in [0, 1] with sum `kept`: u_i = clip(c z_i - strength, 0, 1), c found by halving. For fewer than n kept groups.

    Groups of zero norm get nothing, and what then is left over nobody gets.
    """
    low, high = torch.zeros((), dtype=norms.dtype), (1 + strength) / norms[norms > 0].min()
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        is_less = (middle * norms - strength).clamp(0, 1).sum() < kept
        low, high = (middle, high) if is_less else (low, middle)
    return (high * norms - strength).clamp(0, 1)


def proximal_step(norms: Tensor, kept: int, strength: float) -> Tensor:
    """The norms x that minimise |x - z|^2 / 2 + strength / 2 times the squared k-support norm of x, k = `kept`."""
    shares = envelope_shares(norms, kept, strength)
    return norms * shares / (shares + strength)


def shrink_factors(norms: Tensor, kept: int, strength: float) -> Tensor:
    """What each group is multiplied by: the proximal step, without what it takes off every kept group alike."""
    if not (norms > 0).any():
        return torch.ones_like(norms)
    shares = envelope_shares(norms, kept, strength)
    return shares * (1 + strength) / (shares + strength)
